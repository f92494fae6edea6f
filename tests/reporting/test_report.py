"""report.py: one self-contained page from a whole run, and from half a one."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections import Counter

import pytest
import synthetic_run
from test_view import Tags

from r3rag_jax.data.trajectories import trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.tables.table import Table, TableRow
from r3rag_jax.report import main
from r3rag_jax.reporting import expected, explorer
from r3rag_jax.reporting.curves import (
    MAX_POINTS,
    Curve,
    Frame,
    Plot,
    draw,
    moving_mean,
    nice_ticks,
    read_band,
    read_curve,
    short,
    tick_label,
)
from r3rag_jax.reporting.explorer import explorer_block
from r3rag_jax.reporting.gallery import gallery, milestones
from r3rag_jax.reporting.paper_tables import as_json, table_from_json
from r3rag_jax.reporting.report_page import headline, report_html, write_report
from r3rag_jax.reporting.run_files import load_run
from r3rag_jax.reporting.time_split import draw_time_split
from r3rag_jax.types import Question


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return synthetic_run.build(tmp_path_factory.mktemp("runs") / "synthetic")


@pytest.fixture(scope="module")
def html(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_self_contained(html):
    tags = Tags(html.removeprefix("<!doctype html>")).seen
    assert {tag for tag, _ in tags}.isdisjoint({"img", "iframe", "object"})
    assert [attrs for tag, attrs in tags if tag == "script"] == [
        {"type": "application/json", "id": "trajectories-data"}, {},
    ]  # fmt: skip
    links = [attrs[name] for _, attrs in tags for name in ("src", "href") if name in attrs]
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    assert "url(" not in html and "@import" not in html
    assert not re.findall(r"https?://", html)


def test_page_has_dark_colours_and_fits_a_phone(html):
    assert "@media (prefers-color-scheme: dark)" in html
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html


def test_page_shows_every_part(html):
    assert "<h1>synthetic</h1>" in html
    assert html.count('<figure class="plot">') == 13
    assert html.count('<details class="card"') == 4 * 4 + 3 + 1  # types x cases, milestones, config
    assert "iterations: 40" in html
    assert 'class="missing"' not in html


def test_plots_are_drawings_with_finite_places(html):
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        root = ET.fromstring(svg)
        numbers = [n for p in root.iter("path") for n in re.findall(r"[-\d.e]+", p.attrib["d"])]
        assert len(numbers) >= 2 and all(0 <= float(n) <= Frame.width for n in numbers)
        assert root.find("./g/title") is not None


def test_a_judge_has_plots_where_it_was_asked(tmp_path):
    run_dir = synthetic_run.build(tmp_path / "judged")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    judged = {"acc": 0.8, "judge_failure_rate": 0.02, "left_out": 0.05}
    rows = [row | (judged if row["phase"] == "rl" else {}) for row in rows]
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert html.count('<figure class="plot">') == 15
    assert all(
        name in html for name in ("Accuracy according to the judge", "failed judgements", "trajectories left out")
    )


def test_what_guards_watch_has_plots(tmp_path):
    run_dir = synthetic_run.build(tmp_path / "guarded")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("repeated_query_rate", "equal_groups", "trajectory_tokens", "approx_kl", "displacement", "reward_format")
    rows = [row | (dict.fromkeys(names, 0.1) if row["phase"] == "rl" else {}) for row in rows]
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    html = write_report(run_dir).read_text(encoding="utf-8")
    for title in ("Signs of a collapse", "Length", "Policy change in an iteration", "Displacement"):
        assert f"<strong>{title}</strong>" in html
    assert "malformed step" in html and "queries repeated" in html


@pytest.mark.parametrize(
    ("phases", "missing"),
    [(("sft",), 3), (("sft", "rl"), 2), ((), 4), (("eval",), 2)],
)
def test_half_a_run_says_what_is_missing(tmp_path, phases, missing):
    html = write_report(synthetic_run.build(tmp_path / "half", phases)).read_text(encoding="utf-8")
    assert html.count('class="missing"') == missing
    Tags(html.removeprefix("<!doctype html>"))


def test_texts_with_other_line_ends_are_read_whole(tmp_path):
    run_dir = synthetic_run.build(tmp_path / "ends")
    asked = "Who\u2028wrote\x85it\x0b?\x1c"
    row = trajectory_to_dict(synthetic_run.right(Question("odd", asked, ("x",))))
    with (run_dir / "trajectories" / "r3rag.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    run = load_run(run_dir)
    assert run.notices == () and run.trajectories["r3rag"][-1].question.question == asked


def test_rows_that_training_did_not_write_are_left_out(tmp_path):
    run_dir = synthetic_run.build(tmp_path / "foreign")
    row = trajectory_to_dict(synthetic_run.right(Question("of an evaluation", "Who?", ("x",))))
    for name, lines in {"metrics.jsonl": ["[1]", '{"loss": 1}'], "trajectories/rl.jsonl": [json.dumps(row)]}.items():
        with (run_dir / name).open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
    run = load_run(run_dir)
    assert (len(run.metrics["rl"]), len(run.metrics["sft"]), len(run.rollouts)) == (40, 400, 40)
    assert run.notices == ("metrics.jsonl: line 441 is not JSON and was left out.",)


def test_a_line_cut_off_by_a_crash_is_named_and_left_out(tmp_path):
    run_dir = synthetic_run.build(tmp_path / "cut")
    for name in ("metrics.jsonl", "trajectories/r3rag.jsonl"):
        with (run_dir / name).open("a") as file:
            file.write('{"phase": "rl", "st')
    with (run_dir / "trajectories" / "r3rag.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"id": "q"}) + "\n")
    (run_dir / "eval" / "r3rag.json").write_text("{")
    run = load_run(run_dir)
    assert len(run.metrics["rl"]) == 40 and len(run.trajectories["r3rag"]) == 16 and len(run.evals) == 3
    assert len(run.notices) == 4
    assert "metrics.jsonl: line 441 is not JSON and was left out." in run.notices
    assert "eval/r3rag.json is not JSON and was left out." in run.notices
    assert "metrics.jsonl: line 441" in write_report(run_dir).read_text(encoding="utf-8")


def test_command_line(run_dir, tmp_path, capsys):
    assert main([str(run_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    assert main([str(tmp_path)]) == 2
    expected = f"error: expected a run directory with config.yaml or metrics.jsonl; got {tmp_path}\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(UserError):
        load_run(tmp_path / "nowhere")


def test_evaluations_come_in_order_baselines_first(run_dir):
    assert [e["system"] for e in load_run(run_dir).evals] == [
        "closed_book",
        "naive_rag",
        "cold_start",
        "r3rag",
    ]


def test_headline():
    evals = [synthetic_run.evaluation(system) for system in ("naive_rag", "cold_start", "r3rag")]
    assert headline(evals) == (
        "R3-RAG answers 73.0 % of 200 test questions exactly: "
        "+17.5 points against Cold start, +51.5 points against Naive RAG."
    )
    assert headline(evals[:2]) == "" and headline([]) == ""


# ------------------------------------------------------------------------------------------ curves


def test_read_curve_scales_and_leaves_out_what_is_not_finite():
    rows = [{"step": i, "em": v} for i, v in enumerate((0.1, math.nan, 0.3, None))] + [{"step": 4}]
    curve = read_curve(rows, "em", "train", 100)
    assert curve.steps == [0, 2] and curve.values == pytest.approx([10, 30])
    assert (curve.block, curve.num_broken, curve.is_smoothed) == (1, 1, False)


def test_long_curves_become_block_means():
    curve = read_curve([{"step": i, "loss": float(i % 2)} for i in range(4 * MAX_POINTS)], "loss", "loss")
    assert len(curve.values) == MAX_POINTS and set(curve.values) == {0.5}
    assert curve.steps[:2] == [1.5, 5.5] and curve.block == 4


def test_moving_mean_keeps_the_start_and_calms_the_end():
    values = [0.0] * 10 + [2.0, 0.0] * 5  # reach 20 // 20 + 2 = 3
    smooth = moving_mean(values)
    assert smooth[:7] == [0.0] * 7
    assert smooth[10] == pytest.approx(4 / 7)  # 0 0 0 2 0 2 0
    assert smooth[-1] == 1.0  # 2 0 2 0
    assert moving_mean([3.0, 1.0]) == [3.0, 1.0]
    straight = [float(i) for i in range(30)]
    assert moving_mean(straight)[:26] == straight[:26]  # not delayed


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 85, ["0", "20", "40", "60", "80", "100"]),
        (0, 0.0288, ["0.00", "0.01", "0.02", "0.03"]),
        (-0.04, 0.65, ["-0.2", "0.0", "0.2", "0.4", "0.6", "0.8"]),
        (0, 0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-1, -1, ["-1.6", "-1.4", "-1.2", "-1.0", "-0.8", "-0.6", "-0.4"]),
        (-1e-8, 0.0006, ["0.0000", "0.0002", "0.0004", "0.0006"]),
        (1000, 5000, ["1,000", "2,000", "3,000", "4,000", "5,000"]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    ticks = nice_ticks(low, high, 5)
    assert [tick_label(tick, ticks) for tick in ticks] == expected
    assert ticks[0] <= low + 1e-6 and ticks[-1] >= high


@pytest.mark.parametrize(("value", "text"), [(5136.4, "5,136"), (-0.0625, "-0.0625"), (86.04, "86"), (1e12, "1e+12")])
def test_values_of_a_legend_are_short(value, text):
    assert short(value) == text


def test_step_ticks_are_whole():
    assert nice_ticks(0, 2, 5, is_whole=True) == [0, 1, 2]


def test_frame_places_values_upwards_and_from_the_left():
    frame = Frame([Curve("c", [0, 10], [0.0, 5.0], [0.0, 5.0], 1, 0)], from_zero=True)
    assert (frame.x(0), frame.x(10)) == (frame.left, frame.right)
    assert (frame.y(0), frame.y(5)) == (frame.bottom, frame.top)
    bands = frame.bands([Curve("c", [0, 10], [0.0, 5.0], [0.0, 5.0], 1, 0)])
    assert [band[3] for band in bands] == ["0: c 0", "10: c 5"]
    assert bands[0][0] + bands[0][1] == bands[1][0] == (frame.left + frame.right) / 2


def test_draw_names_broken_values_and_draws_nothing_from_nothing():
    plot = Plot("KL", "nats", (("kl", "KL"),))
    assert draw(plot, [{"step": 0, "loss": 1.0}], "step") is None
    html = draw(plot, [{"step": 0, "kl": 1.0}, {"step": 1, "kl": math.inf}], "step")
    assert html is not None and "1 values of KL are not finite." in html


# ----------------------------------------------------------------------------- time, trajectories, other runs


def recorded(path, **sizes):
    """A run that was recorded with all that RL knows."""
    return synthetic_run.add_recorded(synthetic_run.build(path), **sizes)


def block_of(html):
    """The data of the page's explorer."""
    return json.loads(re.search(r'id="trajectories-data">(.*?)</script>', html)[1])


def test_the_time_split_is_drawn_where_it_was_recorded(tmp_path):
    rows = load_run(recorded(tmp_path / "timed", iterations=1)).metrics["rl"]
    html = draw_time_split(rows)
    names = re.findall(r'<span class="key t\d"><i></i>([a-z ]+) <b>(\d+) %', html)
    assert [name for name, _ in names] == [
        "prefill", "decode", "waiting for search", "scoring", "update", "evaluation", "checkpoint", "other",
    ]  # fmt: skip
    assert sum(int(percent) for _, percent in names) == pytest.approx(100, abs=4)
    assert html.count('<g class="stack">') == 40 and "Each bar" not in html
    assert "Each bar is the mean of 3 iterations." in draw_time_split([*rows] * 5)
    assert draw_time_split(synthetic_run.metrics("rl")) is None


def test_a_page_holds_what_was_recorded_of_every_step_and_passages_once(tmp_path):
    run_dir = recorded(tmp_path / "steps", iterations=3)
    data = block_of(write_report(run_dir).read_text(encoding="utf-8"))
    rollouts, cold_start, r3rag = data["sources"]
    assert [source["title"] for source in data["sources"]] == ["RL rollouts", "Cold start", "R3-RAG"]
    assert (len(rollouts["items"]), len(cold_start["items"]), len(r3rag["items"])) == (12, 16, 16)
    assert len(data["passages"]) == 3
    rows = [json.loads(line) for line in (run_dir / "trajectories" / "rl.jsonl").read_text().splitlines()]
    for item, row in zip(rollouts["items"], rows, strict=True):
        assert (item["i"], item["r"], item["s"]) == (row["iteration"], round(row["reward"], 4), row["sample_index"])
        for shown, step in zip(item["steps"], row["steps"], strict=True):
            assert shown["adv"] == round(step["advantage"], 3) and len(shown["t"]) == len(shown["lp"]) == len(
                step["tokens"]
            )
            assert [data["passages"][n][0] for n in shown["p"]] == [
                passage["contents"].split('"')[1] for passage in step.get("passages", [])
            ]
    assert "r" not in r3rag["items"][0]


def test_too_many_trajectories_are_left_out_in_whole_groups(tmp_path, monkeypatch):
    run = load_run(recorded(tmp_path / "many", iterations=30, num_steps=3))
    whole = explorer_block(run)
    assert (whole.num, whole.num_left_out, whole.has_tokens) == (30 * 4 + 32, 0, True)
    monkeypatch.setattr(explorer, "MAX_BYTES", len(whole.json) // 4)
    block = explorer_block(run)
    assert len(block.json) < 1.05 * len(whole.json) / 4 and block.num + block.num_left_out == whole.num
    [items] = [source["items"] for source in json.loads(block.json)["sources"] if source["name"] == "rl"]
    groups = Counter(item["i"] for item in items)
    assert set(groups.values()) == {4} and len(groups) < 12 and max(groups) > 20 > min(groups)
    monkeypatch.setattr(explorer, "MAX_BYTES", int(0.9 * len(whole.json)))
    items = json.loads(explorer_block(run).json)["sources"][0]["items"]
    has_tokens = ["t" in item["steps"][0] for item in items]
    assert len(items) == 120 and 0 < sum(has_tokens) < 120
    assert has_tokens == sorted(has_tokens)  # the tokens of the oldest go first


@pytest.mark.slow
def test_a_thousand_trajectories_fit_ten_megabytes(tmp_path):
    sizes = {"iterations": 25, "questions": 5, "samples": 8, "num_steps": 5}
    path = write_report(recorded(tmp_path / "big", **sizes))
    assert len(block_of(path.read_text(encoding="utf-8"))["sources"][0]["items"]) == 1000
    assert path.stat().st_size < 10_000_000


def test_odd_rows_of_steps_do_no_harm(tmp_path):
    run_dir = recorded(tmp_path / "odd", iterations=1)
    rows = [json.loads(line) for line in (run_dir / "trajectories" / "rl.jsonl").read_text().splitlines()]
    rows[0]["steps"][0] |= {"tokens": "no list", "reward": "x", "advantage": None}
    rows[1]["steps"][0] |= {"logprobs": [1.0]}  # of another length
    (run_dir / "trajectories" / "rl.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    items = block_of(write_report(run_dir).read_text(encoding="utf-8"))["sources"][0]["items"]
    assert not {"t", "r", "adv"} & items[0]["steps"][0].keys()
    assert "t" in items[1]["steps"][0] and "lp" not in items[1]["steps"][0]


def test_habits_before_and_after_rl_are_shown(html, run_dir, tmp_path):
    [(titles, cells)] = re.findall(
        r'<section id="habits">.*?<thead>(.*?)</thead>.*words of its own</th>(.*?)</tr>', html, re.S
    )
    assert re.findall(r"<th[^>]*>(.*?)</th>", titles) == ["habit", "Cold start", "R3-RAG"]
    assert re.fullmatch(r"<td>—</td><td>[\d.]+ % \(\d+ of \d+\)</td>", cells)
    alone = shutil.copytree(run_dir, tmp_path / "alone")
    (alone / "trajectories" / "cold_start.jsonl").unlink()
    assert ">Cold start</th>" not in report_html(load_run(alone)).partition('id="habits"')[2].partition("</thead>")[0]


def test_tables_of_the_run_are_shown(run_dir, tmp_path):
    copy = synthetic_run.build(tmp_path / "tables")
    row = TableRow("without <b>", {"test": {"em": 41.0}}, {"test": {"em": [39.0, 43.0]}}, {"test": 0.01})
    rows = [TableRow("whole", {"test": {"em": 50.0}}), row]
    table = Table("ablations", "Ablations", "variant", ("em",), {"test": 400}, rows, ["A note."], {}, "whole")
    (copy / "tables").mkdir()
    (copy / "tables" / "ablations.json").write_text(as_json(table, "evaluate table"))
    (copy / "tables" / "other.json").write_text("[]")
    assert table_from_json(as_json(table, "evaluate table")) == table
    html = write_report(copy).read_text(encoding="utf-8")
    assert "<h3>Ablations (test: 400 questions)</h3>" in html and "without &lt;b&gt;" in html and "41.0 ±2.0" in html
    assert "A note." in html and "tables/other.json is no table of this version" in html


def test_a_band_is_of_runs():
    runs = [[{"step": i, "em": value} for i in range(3)] for value in (0.2, 0.4)] + [[{"step": 0, "em": 0.9}]]
    curve = read_band(runs, "em", "em", 100)
    assert curve.steps == [0, 1, 2] and curve.values == pytest.approx([50, 30, 30])
    assert curve.band == (pytest.approx([20, 20, 20]), pytest.approx([90, 40, 40]))
    assert read_band(runs[:1], "em", "em").band is None and read_band([], "em", "em").values == []
    assert Frame([curve], True).y_ticks[-1] >= 90  # the whole band is shown


def test_what_is_expected_of_a_recipe_is_behind_its_runs(tmp_path, monkeypatch):
    runs = [synthetic_run.build(tmp_path / name) for name in ("one", "two")]
    for number, one in enumerate(runs):
        (one / "config.yaml").write_text(
            f"name: n{number}\nseed: {number}\nrl:\n  lr: 0.5\nlog:\n  trajectories: {number}\n"
        )
    assert main([*map(str, runs), "--record", str(tmp_path / "recipe.json")]) == 0
    recorded_runs = json.loads((tmp_path / "recipe.json").read_text())
    assert (recorded_runs["title"], recorded_runs["settings"]) == ("recipe, 2 runs", {"rl.lr": 0.5})
    assert "time_s" not in recorded_runs["runs"][0][0] and len(recorded_runs["runs"][1]) == 40
    monkeypatch.setattr(expected, "_recorded", lambda: [recorded_runs])
    html = write_report(runs[0]).read_text(encoding="utf-8")
    assert "Grey: recipe, 2 runs, mean and range." in html and html.count('class="key expected"') > 4
    (runs[0] / "config.yaml").write_text("rl:\n  lr: 0.6\n")
    assert 'class="key expected"' not in write_report(runs[0]).read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main([*map(str, runs), "--watch"])


def test_runs_with_other_settings_are_not_recorded_as_one_recipe(tmp_path, capsys):
    runs = [synthetic_run.build(tmp_path / name) for name in ("one", "two")]
    (runs[1] / "config.yaml").write_text("rl:\n  lr: 0.5\n")
    assert main([*map(str, runs), "--record", str(tmp_path / "recipe.json")]) == 2
    assert "must differ in name and seed alone; got other values of rl.lr" in capsys.readouterr().err
    assert not (tmp_path / "recipe.json").exists()


def test_recorded_recipes_are_those_of_the_package():
    for recipe in expected._recorded():
        assert recipe["runs"] and all(rows and "reward" in rows[0] for rows in recipe["runs"]), recipe["title"]


# ----------------------------------------------------------------------------------------- gallery


def test_gallery_pairs_systems_and_shows_every_case(run_dir):
    main_system, other, exhibits = gallery(load_run(run_dir))
    assert (main_system, other, list(exhibits)) == (
        "r3rag",
        "cold_start",
        list(synthetic_run.TYPES),
    )
    for shown in exhibits.values():
        assert [exhibit.title for exhibit in shown] == [
            "newly right",
            "right both times",
            "newly wrong",
            "wrong both times",
        ]
        assert all(e.other and e.other.question.id == e.main.question.id and e.num == 1 for e in shown)


def test_gallery_of_a_cold_start_alone_shows_right_and_wrong(run_dir, tmp_path):
    run = load_run(synthetic_run.build(tmp_path / "cold"))
    del run.trajectories["r3rag"]
    main_system, other, exhibits = gallery(run)
    assert (main_system, other) == ("cold_start", "")
    shown = [(e.title, e.num, e.other) for e in exhibits["single"]]
    assert shown == [("right", 2, None), ("wrong", 2, None)]


def test_milestones(run_dir):
    chosen = milestones(load_run(run_dir))
    assert [(iteration, reward) for iteration, reward, _ in chosen] == [
        (0, 0.0),
        (20, 1.0),
        (39, 1.95),
    ]

"""The report in Chromium: filters, a histogram bin, keys, groups, shading, links; texts stay texts; a watched run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic_run
from browser import PageOpener, faults

from r3rag_jax.data.trajectories import trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.reporting.comparison_page import comparison_html
from r3rag_jax.reporting.report_page import write_report
from r3rag_jax.reporting.watch import HOST, WatchedRun, make_server
from r3rag_jax.run.files import write_text
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

ITERATIONS = 6


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = synthetic_run.build(tmp_path_factory.mktemp("runs") / "recorded")
    return synthetic_run.add_recorded(run_dir, iterations=ITERATIONS)


@pytest.fixture(scope="module")
def report(run_dir: Path) -> Path:
    return write_report(run_dir)


def found(page: Any) -> str:
    return page.inner_text("#found")


def test_filters_narrow_the_list_and_are_taken_back(report: Path, open_page: PageOpener) -> None:
    page = open_page(report)
    assert found(page) == "24 of 24 trajectories"
    page.select_option("#filter-outcome", "right")
    assert found(page) == "6 of 24 trajectories"
    page.select_option("#filter-type", "bridge")
    assert found(page) == "2 of 24 trajectories"
    page.click("#reset")
    page.select_option("#filter-status", "no answer")
    assert found(page) == "6 of 24 trajectories"
    page.fill("#filter-text", "malthen came OUT")  # words of a passage, in another case
    assert found(page) == "0 of 24 trajectories"
    page.fill("#filter-text", "Ilse MALTHEN that came")
    assert found(page) == "6 of 24 trajectories"
    page.keyboard.press("Escape")
    assert found(page) == "24 of 24 trajectories"
    page.select_option("#filter-source", "r3rag")
    assert found(page) == "16 of 16 trajectories"
    assert page.is_hidden("#histogram")  # evaluations have no rewards


def test_a_bar_of_the_histogram_opens_its_trajectories(report: Path, open_page: PageOpener) -> None:
    page = open_page(report)
    bins = page.locator(".bin:not([disabled])")
    counts = [int(label.split(": ")[1].split()[0]) for label in bins.evaluate_all("x => x.map(b => b.ariaLabel)")]
    assert sum(counts) == 24 and len(counts) > 3
    bins.first.click()
    assert found(page) == f"{counts[0]} of 24 trajectories"
    low, high = (float(page.input_value(f"#filter-{name}")) for name in ("low", "high"))
    rewards = page.locator("#list .facts").all_inner_texts()
    assert all(low - 0.01 <= float(text.split("reward ")[1].split()[0]) <= high + 0.01 for text in rewards)
    assert page.locator('.bin[aria-pressed="true"]').count() == 1
    page.locator('.bin[aria-pressed="true"]').click()
    assert found(page) == "24 of 24 trajectories"


def test_keys_step_show_the_group_and_shade_tokens(report: Path, open_page: PageOpener) -> None:
    page = open_page(report)
    assert page.get_attribute("#list [aria-current=true]", "data-key") == "rl.0"
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert page.get_attribute("#list [aria-current=true]", "data-key") == "rl.1"
    page.keyboard.press("g")
    assert page.locator(".side-by-side section").count() == 4
    assert page.locator("table.group tbody tr").count() == 4
    recorded = [json.loads(line) for line in (report.parent / "trajectories" / "rl.jsonl").read_text().splitlines()]
    first = recorded[0]["steps"][0]
    shown = page.locator("table.group tbody tr").first.locator("td").nth(2).inner_text()
    assert shown.replace("\N{MINUS SIGN}", "-") == f"{round(first['advantage'], 3):+.2f}"
    page.keyboard.press("s")
    assert page.input_value("#shade") == "advantage"
    token = page.locator(".side-by-side section").first.locator(".tokens span[title]").first
    assert token.get_attribute("title") == f"advantage {round(first['advantage'], 3)}"
    page.keyboard.press("s")
    assert token.get_attribute("title") == f"log-probability {round(first['logprobs'][0], 2):g}"
    assert page.locator('#shade option[value="entropy"]').count() == 0  # was not recorded
    page.keyboard.press("/")
    page.keyboard.type("jk")  # in the field they are letters
    assert page.input_value("#filter-text") == "jk"


def test_a_link_opens_the_same_view(report: Path, open_page: PageOpener) -> None:
    page = open_page(report)
    for key in ("j", "j", "g", "s"):
        page.keyboard.press(key)
    link = page.get_attribute(".tools a", "href")
    assert link == "#show=rl.2&group=1&shade=advantage"
    again = open_page(report.resolve().as_uri() + link)
    assert again.get_attribute("#list [aria-current=true]", "data-key") == "rl.2"
    assert again.locator(".side-by-side section").count() == 4 and again.input_value("#shade") == "advantage"


def test_an_evaluation_shows_the_other_system_beside(report: Path, open_page: PageOpener) -> None:
    page = open_page(report)
    page.select_option("#filter-source", "r3rag")
    page.click("#group")
    assert page.locator(".side-by-side h4").all_inner_texts() == ["Cold start", "R3-RAG"]


@pytest.fixture(scope="module")
def few_plots(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with one plot of each kind: checking a text on a drawing takes long."""
    small = synthetic_run.build(tmp_path_factory.mktemp("runs") / "small", ("rl", "eval"))
    synthetic_run.add_recorded(small, iterations=1)
    rows = [json.loads(line) for line in (small / "metrics.jsonl").read_text().splitlines()]
    kept = ("phase", "step", "reward", "em", "iteration_s", "decode_s", "update_s")
    synthetic_run._write_lines(small / "metrics.jsonl", [{name: row[name] for name in kept} for row in rows[:8]])
    return write_report(small)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_contrast_labels_and_width(width: int, dark: bool, few_plots: Path, open_page: PageOpener) -> None:
    page = open_page(few_plots, width=width, dark=dark)
    page.keyboard.press("g")
    page.keyboard.press("s")
    assert faults(page) == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_contrast_labels_and_width_of_a_whole_page(dark: bool, report: Path, open_page: PageOpener) -> None:
    assert faults(open_page(report, width=360, dark=dark)) == []


@pytest.mark.slow
def test_a_thousand_trajectories_open_and_are_filtered(tmp_path: Path, open_page: PageOpener) -> None:
    sizes = {"iterations": 25, "questions": 5, "samples": 8, "num_steps": 5}
    report = write_report(synthetic_run.add_recorded(synthetic_run.build(tmp_path / "big"), **sizes))
    page = open_page(report)
    ready = "performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart"
    print(f"{report.stat().st_size / 1e6:.1f} MB, ready after {page.evaluate(ready)} ms")  # depends on the machine
    assert found(page) == "1000 of 1000 trajectories"
    page.fill("#filter-text", "title 7")
    assert 0 < int(found(page).split()[0]) < 1000
    page.click("#reset")
    for key in "jgs":
        page.keyboard.press(key)
    assert page.locator(".side-by-side section").count() == 8


def test_text_from_outside_is_text(run_dir: Path, tmp_path: Path, open_page: PageOpener) -> None:
    evil = "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'><!-- {{ 7 * 7 }} \u2028"
    steps = (
        Step(f"analysis {evil}", query=f"query {evil}", passages=(Passage("p", f'"title {evil}"\npassage {evil}'),)),
        Step("", answer=f"answer {evil}"),
    )
    asked = Question(f"id {evil}", f"question {evil}", (f"gold {evil}",), {"type": f"type {evil}"})
    row = trajectory_to_dict(Trajectory(asked, steps, Status.ANSWERED)) | {"reward": 1.0, "iteration": 0}
    row["steps"][0] |= {"tokens": [f"token {evil}"], "logprobs": [-0.5]}
    copy = synthetic_run.build(tmp_path / "evil", ("sft", "rl"))
    synthetic_run._write_lines(copy / "trajectories" / "rl.jsonl", [row])
    synthetic_run._write_lines(copy / "trajectories" / "r3rag.jsonl", [row])
    (copy / "config.yaml").write_text(f"name: {json.dumps(evil)}\n")
    page = open_page(write_report(copy))
    shown = page.inner_text("#detail")
    for part in ("question", "analysis", "query", "title", "passage", "answer", "gold", "type"):
        assert f"{part} </script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>" in shown, part
    page.select_option("#shade", "logprob")
    assert "token </script><script>" in page.inner_text("#detail")
    assert page.evaluate("window.owned") is None and page.locator("#detail img").count() == 0


def test_several_runs_are_one_page(run_dir: Path, tmp_path: Path, open_page: PageOpener) -> None:
    runs = []
    for name, seed, rate in (("plain-1", 1, "0.0001"), ("plain-2", 2, "0.0001"), ("fast", 1, "0.001")):
        one = synthetic_run.build(tmp_path / name)
        (one / "config.yaml").write_text(f"name: {name}\nseed: {seed}\nrl:\n  iterations: 40\n  lr: {rate}\n")
        runs.append(one)
    write_text(tmp_path / "comparison.html", comparison_html(runs))
    page = open_page(tmp_path / "comparison.html")
    header, plain, fast = page.locator("#summary tr").all_inner_texts()
    assert header.split("\t")[:3] == ["runs", "rl.lr", "reward"]
    assert plain.split("\t")[:2] == ["plain, 2 runs", "0.0001"] and " to " in plain
    assert fast.split("\t")[:2] == ["fast", "0.001"] and " to " not in fast
    figure = page.locator("figure", has_text="Reward").first
    assert figure.locator("path.area").count() == 1 and figure.locator("path.line").count() == 2
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 360


# ------------------------------------------------------------------------------------------ while a run goes


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A run that is watched, and the address of its page."""
    run_dir = synthetic_run.build(tmp_path / "going", ("sft", "rl"))
    server = make_server(WatchedRun(str(run_dir), every_ms=50), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield run_dir, f"http://{HOST}:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_watched_page_follows_its_run(served: tuple[Path, str], open_page: PageOpener) -> None:
    run_dir, address = served
    page = open_page(address)
    assert page.inner_text("#live") == "RL iteration 39 is done"
    page.select_option("#filter-outcome", "right")
    assert found(page) == "10 of 40 trajectories"
    row = trajectory_to_dict(synthetic_run.right(synthetic_run.question(7))) | {"reward": 2.0, "iteration": 40}
    with (run_dir / "trajectories" / "rl.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    metrics = synthetic_run.metrics("rl")[-1] | {"step": 40, "iteration_s": 9.5, "eta_s": 600.0}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n")
    page.get_by_text("RL iteration 40 is done, it took 9.5 s, 10 min left").wait_for()
    page.get_by_text("11 of 41 trajectories").wait_for()  # the filter is still set
    assert "41 steps" in page.inner_text("#rl")


def test_a_watched_page_is_for_this_machine_alone(served: tuple[Path, str]) -> None:
    import httpx

    run_dir, address = served
    version = httpx.get(f"{address}version")
    assert version.status_code == 200 and version.headers["cache-control"] == "no-store"
    assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(f"{address}metrics.jsonl").status_code == 404
    assert httpx.get(f"{address}../config.yaml").status_code == 404
    with pytest.raises(UserError, match=r"--port must be free on 127\.0\.0\.1; \d+ cannot be used: "):
        make_server(WatchedRun(str(run_dir)), httpx.URL(address).port or 0)
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "config.yaml").unlink()
    gone = httpx.get(address)
    assert gone.status_code == 503 and "expected a run directory" in gone.text


def test_a_version_is_of_what_the_page_shows(tmp_path: Path) -> None:
    run_dir = synthetic_run.build(tmp_path / "going", ("sft",))
    watched = WatchedRun(str(run_dir))
    before, page = watched.version(), watched.page()
    (run_dir / "notes.txt").write_text("mine")
    assert (watched.version(), watched.page()) == (before, page)
    (run_dir / "phases.jsonl").write_text(json.dumps(synthetic_run.cost("index")))
    assert watched.version() != before and ">Index</th>" in watched.page() and ">Cold start</th>" not in watched.page()
    before = watched.version()
    (run_dir / "eval").mkdir()
    (run_dir / "eval" / "r3rag.json").write_text(json.dumps(synthetic_run.evaluation("r3rag")))
    assert watched.version() != before and "R3-RAG answers 73.0 %" in watched.page()


def test_what_a_run_without_trajectories_lacks_is_not_there(tmp_path: Path, open_page: PageOpener) -> None:
    run_dir = synthetic_run.build(tmp_path / "half", ("sft",))
    page = open_page(write_report(run_dir))
    assert page.locator("#explorer").count() == page.locator("#time figure").count() == 0
    assert page.locator("#time table").count() == 1  # what its phases took is known

"""What notebooks show: errors by type, two systems compared, curves of one run and of several."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import synthetic_run
from test_view import Tags

from r3rag_jax.reporting import fragments
from r3rag_jax.reporting.fragments import errors_html, paired_html, pairs_of, plot_curves, time_html
from r3rag_jax.reporting.run_files import load_run
from r3rag_jax.types import Question, Trajectory


def cells(html: str) -> list[list[str]]:
    """The texts of a table, row by row."""
    Tags(html)
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def attempts(*kinds: str) -> list[Trajectory]:
    """A trajectory of each kind, on questions 0, 1, … of two types."""
    makers = {
        "right": synthetic_run.right, "wrong": synthetic_run.wrong, "malformed": synthetic_run.malformed,
        "none": synthetic_run.no_answer,
    }  # fmt: skip
    types = ("bridge", "comparison <b>")
    return [makers[kind](synthetic_run.question(number, types[number % 2])) for number, kind in enumerate(kinds)]


def test_errors_are_counted_by_type_and_ending() -> None:
    html = errors_html(attempts("right", "wrong", "right", "malformed", "none"))
    assert cells(html) == [
        ["questions", "right", "wrong", "no answer", "malformed step", "n"],
        ["bridge", "2", "0", "1", "0", "3"],
        ["comparison &lt;b&gt;", "0", "1", "0", "1", "2"],
        ["all", "2", "1", "1", "1", "5"],
    ]
    assert cells(errors_html([])) == [["questions", "n"]]
    unknown = synthetic_run.right(Question("q", "?", ()))  # there is no gold answer to compare with
    assert cells(errors_html([unknown])) == [["questions", "not known", "n"], ["all questions", "1", "1"]]


def test_two_systems_are_compared_question_by_question() -> None:
    one, other = attempts("right", "wrong", "none", "wrong"), attempts("right", "right", "right", "malformed")
    pairs = pairs_of(one, other[::-1])  # in another order
    assert [a.question.id for a, _ in pairs] == [b.question.id for _, b in pairs] == ["q3", "q2", "q1", "q0"]
    html = paired_html(pairs)
    assert cells(html) == [["", "second right", "second wrong"], ["first right", "1", "0"], ["first wrong", "2", "1"]]
    assert "EM 25.0 and 75.0 %, +50.0 points; McNemar, exact: p = 0.5." in html
    assert "There are no questions that both have answered." in paired_html(pairs_of(one, []))


def test_one_run_has_its_metrics_together_and_several_one_by_one(tmp_path: Path) -> None:
    runs = [load_run(synthetic_run.build(tmp_path / name)) for name in ("one", "two")]
    plot = next(plot for plot in fragments.PLOTS["rl"] if plot.title == "Exact match")
    [both] = fragments._curves(runs[:1], "rl", plot)
    assert [curve.name for curve in both] == ["rollouts", "dev, greedy"] and both[0].band is None
    rollouts, dev = fragments._curves(runs, "rl", plot)
    assert [rollouts[0].name, dev[0].name] == ["rollouts", "dev, greedy"] and rollouts[0].band is not None


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    run = load_run(synthetic_run.build(tmp_path / "half", ()))
    assert plot_curves([run], "rl") is plot_curves([run, run], "sft") is False
    assert "No iteration says where its time went." in time_html(run)


@pytest.mark.slow
def test_curves_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="needs the `notebook` extra")
    matplotlib.use("agg")
    run = load_run(synthetic_run.build(tmp_path / "run"))
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: None)
    assert plot_curves([run], "rl") and plot_curves([run, run], "sft")
    titles = [axis.get_title(loc="left") for axis in plt.figure(1).axes]
    assert "Exact match" in titles
    plt.close("all")

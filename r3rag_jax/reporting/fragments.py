"""What notebooks show besides results and trajectories: curves of runs, errors by type, paired comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from r3rag_jax.evaluation.groups import type_group
from r3rag_jax.evaluation.statistics import mcnemar
from r3rag_jax.reporting.curves import PLOTS, STEP_NAMES, Curve, Plot, read_band, read_curve
from r3rag_jax.reporting.gallery import ALL_QUESTIONS
from r3rag_jax.reporting.rendering import environment, is_correct, outcome, pretty
from r3rag_jax.reporting.run_files import Run
from r3rag_jax.reporting.time_split import draw_time_split
from r3rag_jax.types import Status, Trajectory

COLORS = ("#1b6fae", "#a06f12", "#b3372f", "#7646b6", "#1f7a4a", "#4f629c")
WIDTH = 3  # plots side by side
ENDINGS = ("right", "wrong", "not known", "no answer", "malformed step", "context full")


def plot_curves(runs: Sequence[Run], phase: str) -> bool:
    """Draw the metrics of a phase with matplotlib; returns whether there are any.

    Of one run, each plot has its metrics, thin as logged and thick smoothed. Of several, each metric has a plot with
    the mean of the runs and the range from the lowest to the highest.
    """
    import matplotlib.pyplot as plt

    drawn = [(plot, curves) for plot in PLOTS[phase] for curves in _curves(runs, phase, plot) if curves]
    if not drawn:
        return False
    height = -(-len(drawn) // WIDTH)
    size = (4 * WIDTH, 2.7 * height)
    _, axes = plt.subplots(height, WIDTH, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    for axis, (plot, curves) in zip(axes.flat, drawn, strict=False):
        _draw(axis, plot, curves, STEP_NAMES[phase])
    plt.show()
    return True


def _curves(runs: Sequence[Run], phase: str, plot: Plot) -> list[list[Curve]]:
    """The curves of each figure."""
    rows = [run.metrics.get(phase, []) for run in runs]
    if len(runs) == 1:
        return [
            [curve for metric, name in plot.curves if (curve := read_curve(rows[0], metric, name, plot.scale)).values]
        ]
    bands = [read_band(rows, metric, name, plot.scale) for metric, name in plot.curves]
    return [[band] for band in bands if band.values]


def _draw(axis: Any, plot: Plot, curves: Sequence[Curve], step_name: str) -> None:
    for color, curve in zip(COLORS, curves, strict=False):
        if curve.band is not None:
            axis.fill_between(curve.steps, *curve.band, color=color, alpha=0.15, lw=0)
        if curve.is_smoothed:
            axis.plot(curve.steps, curve.values, color=color, lw=0.8, alpha=0.35)
        axis.plot(curve.steps, curve.smooth, color=color, lw=1.8, label=curve.name)
    title = plot.title if len(plot.curves) == 1 or len(curves) > 1 else f"{plot.title}: {curves[0].name}"
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_ylabel(plot.unit, fontsize=8)
    axis.set_xlabel(step_name, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if plot.from_zero:
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    if len(curves) > 1:
        axis.legend(fontsize=8, frameon=False)


def time_html(run: Run) -> str:
    """Where the time of RL went; a sentence where no iteration says."""
    figure = draw_time_split(run.metrics.get("rl", []))
    return environment().get_template("time.html.j2").render(figure=figure)


def errors_html(trajectories: Sequence[Trajectory]) -> str:
    """How trajectories ended, by type of question, as a table."""
    kinds = list(dict.fromkeys(map(_kind, trajectories)))
    counts = {kind: Counter(_ending(t) for t in trajectories if _kind(t) == kind) for kind in kinds}
    total = sum(counts.values(), Counter[str]())
    columns = [ending for ending in ENDINGS if total[ending]]
    rows = [(pretty(kind), [str(counts[kind][column]) for column in columns], counts[kind].total()) for kind in kinds]
    rows += [("all", [str(total[column]) for column in columns], total.total())] if len(kinds) > 1 else []
    table = [["questions", *columns, "n"], *([name, *cells, str(num)] for name, cells, num in rows)]
    return _table(table, "Right and wrong by exact match.")


def _kind(trajectory: Trajectory) -> str:
    return type_group(trajectory.question) or ALL_QUESTIONS


def _ending(trajectory: Trajectory) -> str:
    if trajectory.status == Status.ANSWERED:
        return {"right": "right", "wrong": "wrong"}.get(outcome(trajectory).kind, "not known")
    names = {Status.FORMAT_ERROR: "malformed step", Status.CONTEXT_FULL: "context full"}
    return names.get(trajectory.status, "no answer")


Pair = tuple[Trajectory, Trajectory]


def pairs_of(one: Sequence[Trajectory], other: Sequence[Trajectory]) -> list[Pair]:
    """Two systems' trajectories of the same questions, by the questions' ids."""
    first = {trajectory.question.id: trajectory for trajectory in one}
    return [(first[t.question.id], t) for t in other if t.question.id in first]


def paired_html(pairs: Sequence[Pair]) -> str:
    """How two systems differ in exact match on the same questions: a table, and McNemar's exact test."""
    right = np.asarray([[is_correct(t) for t in pair] for pair in pairs], np.float64).reshape(-1, 2)
    counts = Counter((bool(one), bool(other)) for one, other in right)
    table = [["", "second right", "second wrong"]]
    table += [[f"first {name}", *(str(counts[one, other]) for other in (True, False))] for name, one in
              (("right", True), ("wrong", False))]  # fmt: skip
    if not pairs:
        return _table(table, "There are no questions that both have answered.")
    one, other = 100 * right.mean(axis=0)
    p_value = mcnemar(right[:, 0], right[:, 1])
    return _table(
        table, f"EM {one:.1f} and {other:.1f} %, {other - one:+.1f} points; McNemar, exact: p = {p_value:.3g}."
    )


def _table(rows: Sequence[Sequence[str]], note: str) -> str:
    return environment().get_template("counts.html.j2").render(header=rows[0], rows=rows[1:], note=note)

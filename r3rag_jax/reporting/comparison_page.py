"""Several runs on one page: those that differ in name and seed alone are one curve, with mean and range."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from r3rag_jax.config.evaluation import TRAINED_SYSTEMS
from r3rag_jax.reporting.curves import PLOTS, STEP_NAMES, Curve, draw_curves, read_band
from r3rag_jax.reporting.expected import Settings, settings_of
from r3rag_jax.reporting.report_page import page_html
from r3rag_jax.reporting.run_files import Run, load_run

LAST = 0.1  # final values are means over this last share of the iterations: single ones are noisy
MAX_GROUPS = 6  # colours
FINAL = {"reward": ("reward", 1.0, 2), "em": ("EM of rollouts, %", 100.0, 1), "dev_em": ("EM on dev, %", 100.0, 1)}


class Group(NamedTuple):
    """Runs with the same settings."""

    title: str
    runs: list[Run]
    settings: Settings


class Value(NamedTuple):
    """A number of a group: its mean over the runs that have it, and their range."""

    mean: str
    range: str  # "" for one run
    is_best: bool = False


class Summary(NamedTuple):
    """The table of the groups: what they differ in, and what they reached."""

    keys: list[str]  # dotted, of the settings that differ
    metrics: list[str]
    rows: list[tuple[Group, list[str], list[Value | None]]]


def comparison_html(run_dirs: Sequence[str | os.PathLike[str]]) -> str:
    """The page of several runs.

    Raises:
        UserError: one of them is no run directory.
    """
    groups = group_runs([load_run(run_dir) for run_dir in run_dirs])
    plots = {phase: _draw_all(phase, groups) for phase in PLOTS}
    return page_html(
        "comparison.html.j2", [], groups=groups, plots=plots, summary=summary_of(groups), steps=STEP_NAMES,
    )  # fmt: skip


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs with the same settings together, in the order of the first of each; more than colours stay one by one."""
    found: list[tuple[Settings, list[Run]]] = []
    for run in runs:
        settings = settings_of(run.config)
        members = next((members for other, members in found if other == settings), None)
        if members is None:
            found.append((settings, [run]))
        else:
            members.append(run)
    return [Group(_title(members), members, settings) for settings, members in found]


def _title(runs: Sequence[Run]) -> str:
    """The name of a run, or what the names of several begin with."""
    if len(runs) == 1:
        return runs[0].name
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*(run.name for run in runs), strict=False))
    common = "".join(column[0] for column in letters).rstrip("-_. 0123456789") or runs[0].name
    return f"{common}, {len(runs)} runs"


def summary_of(groups: Sequence[Group]) -> Summary:
    """Settings that differ, and final values: of RL over its last iterations, and EM on test questions."""
    names = sorted({name for group in groups for name in group.settings})
    keys = [key for key in names if len({repr(group.settings.get(key)) for group in groups}) > 1]
    finals = [_finals(group) for group in groups]
    metrics = list(dict.fromkeys(name for final in finals for name in final))
    rows = []
    for group, final in zip(groups, finals, strict=True):
        values = [_value(final[name], name, finals) if name in final else None for name in metrics]
        rows.append((group, [_shown(group.settings.get(key)) for key in keys], values))
    return Summary(keys, metrics, rows)


def _finals(group: Group) -> dict[str, list[float]]:
    """Metric's title -> its final value in each run that has one."""
    found: dict[str, list[float]] = {}
    for run in group.runs:
        rows = run.metrics.get("rl", [])
        last = rows[-max(1, round(LAST * len(rows))) :]
        for metric, (title, scale, _) in FINAL.items():
            known = [scale * row[metric] for row in last if row.get(metric) is not None]
            known = known or [scale * row[metric] for row in rows if row.get(metric) is not None][-1:]
            if known:
                found.setdefault(title, []).append(_mean(known))
        for evaluation in run.evals:
            em = evaluation["groups"].get("all", {}).get("em")
            if em is not None and evaluation["system"] in TRAINED_SYSTEMS:
                found.setdefault(f"EM of {evaluation['title']} on test, %", []).append(em)
    return found


def _value(values: Sequence[float], name: str, finals: Sequence[Mapping[str, list[float]]]) -> Value:
    """The cell of a group, with the metric's decimals; the largest mean of all groups is the best."""
    decimals = next((decimals for title, _, decimals in FINAL.values() if title == name), 1)
    means = [_mean(other[name]) for other in finals if name in other]
    shown = f"{min(values):.{decimals}f} to {max(values):.{decimals}f}" if len(values) > 1 else ""
    return Value(f"{_mean(values):.{decimals}f}", shown, len(set(means)) > 1 and _mean(values) == max(means))


def _shown(value: Any) -> str:
    """A setting; what has no entry in `Group.settings` has its default."""
    return "default" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _draw_all(phase: str, groups: Sequence[Group]) -> list[Markup]:
    figures = []
    for plot in PLOTS[phase]:
        for metric, name in plot.curves:
            curves = [_curve(group, phase, metric, plot.scale) for group in groups[:MAX_GROUPS]]
            if drawn := [curve for curve in curves if curve.values]:
                title = plot.title if len(plot.curves) == 1 else f"{plot.title}: {name}"
                figure = dataclasses.replace(plot, title=title, curves=())
                figures.append(draw_curves(figure, drawn, STEP_NAMES[phase]))
    return figures


def _curve(group: Group, phase: str, metric: str, scale: float) -> Curve:
    rows: list[Sequence[Mapping[str, Any]]] = [run.metrics.get(phase, []) for run in group.runs]
    return read_band(rows, metric, group.title, scale)

"""Write the page about a run: `python -m r3rag_jax.report RUN_DIR`.

RUN_DIR/report.html is one self-contained file: result tables, learning curves (SVG drawn by a
template, no script), a gallery of trajectories and the configuration. Whatever a run does not have
yet is named instead of shown.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from r3rag_jax.config.loader import FlagParser
from r3rag_jax.data.qa import trajectory_from_dict
from r3rag_jax.errors import UserError, main_guard
from r3rag_jax.reporting.rendering import environment, is_correct, title_of
from r3rag_jax.types import Trajectory

SYSTEMS = (
    "closed_book",
    "oneshot_rag",
    "cold_start",
    "r3rag",
)  # order of the tables; others follow
COMPARED = ("r3rag", "cold_start")  # the gallery's system and the one beside it
MAX_POINTS = 160  # points of a curve; longer logs are averaged over equal blocks of steps


# ----------------------------------------------------------------------------------- reading a run


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory holds so far."""

    name: str
    config: str  # config.yaml as text, "" where missing
    metrics: dict[str, list[dict[str, Any]]]  # phase -> rows of metrics.jsonl, by step
    evals: list[dict[str, Any]]  # contents of eval/*.json, baselines first
    trajectories: dict[str, list[Trajectory]]  # system -> trajectories of its evaluation
    rollouts: list[tuple[int, float, Trajectory]]  # (RL iteration, reward, trajectory)
    notices: tuple[str, ...]  # what could not be read


def load_run(run_dir: Path | str) -> Run:
    """Reads a run directory, finished or not; UserError when it is not one."""
    run_dir = Path(run_dir)
    config, metrics_path = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    if not (config.is_file() or metrics_path.is_file()):
        raise UserError(f"expected a run directory with config.yaml or metrics.jsonl; got {run_dir}")
    notices: list[str] = []
    metrics: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(metrics_path, notices):
        metrics.setdefault(row["phase"], []).append(row)
    for rows in metrics.values():
        rows.sort(key=lambda row: row["step"])
    trajectories, rollouts = {}, []
    for path in sorted((run_dir / "trajectories").glob("*.jsonl")):
        read = list(_trajectories(path, notices))
        if path.stem == "rl":
            rollouts = [(row["iteration"], row["reward"], trajectory) for row, trajectory in read]
        else:
            trajectories[path.stem] = [trajectory for _, trajectory in read]
    return Run(
        name=run_dir.resolve().name,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        metrics=metrics,
        evals=_evals(run_dir / "eval", notices),
        trajectories=trajectories,
        rollouts=sorted(rollouts, key=lambda rollout: rollout[0]),
        notices=tuple(notices),
    )


def _rows(path: Path, notices: list[str]) -> Iterable[dict[str, Any]]:
    """The lines of a JSONL file that is perhaps still being written; a missing file has none."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError:
            notices.append(f"{path.name}: line {number} is not JSON and was left out.")


def _trajectories(path: Path, notices: list[str]) -> Iterable[tuple[dict[str, Any], Trajectory]]:
    for number, row in enumerate(_rows(path, notices), 1):
        try:
            yield row, trajectory_from_dict(row)
        except ValueError as error:
            notices.append(f"{path.name}: object {number} was left out: {error}.")


def _evals(folder: Path, notices: list[str]) -> list[dict[str, Any]]:
    order = {system: place for place, system in enumerate(SYSTEMS)}
    evals = []
    for path in sorted(folder.glob("*.json"), key=lambda p: (order.get(p.stem, len(order)), p.stem)):
        try:
            evals.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            notices.append(f"eval/{path.name} is not JSON and was left out.")
    return evals


# ------------------------------------------------------------------------------------------ curves


@dataclasses.dataclass(frozen=True)
class Plot:
    """What one plot shows: metrics of a phase on a common axis."""

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]  # (metric, its name in the legend)
    scale: float = 1.0  # what the logged values are multiplied by
    from_zero: bool = True  # whether the axis must hold 0


PLOTS = {
    "rl": (
        Plot("Reward", "mean reward of a trajectory", (("reward", "reward"),), from_zero=False),
        Plot(
            "Parts of the reward",
            "mean of a trajectory",
            (
                ("reward_outcome", "right answer"),
                ("reward_process", "relevant passages"),
                ("reward_format", "malformed step"),
                ("reward_no_answer", "no answer"),
            ),
            from_zero=False,
        ),
        Plot("Exact match", "% of questions", (("em", "rollouts"), ("dev_em", "dev, greedy")), 100),
        Plot("Right, says the judge", "% of questions", (("acc", "rollouts"),), 100),
        Plot("Retrievals", "searches per question", (("mean_retrievals", "retrievals"),)),
        Plot(
            "Attempts without an answer",
            "% of trajectories",
            (("no_answer_rate", "out of steps"), ("format_error_rate", "malformed step")),
            100,
        ),
        Plot(
            "Signs of a collapse",
            "%",
            (("repeated_query_rate", "queries repeated"), ("equal_groups", "questions whose samples earned the same")),
            100,
        ),
        Plot("Length", "sampled tokens per trajectory", (("trajectory_tokens", "tokens"),)),
        Plot("Judge", "%", (("judge_failure_rate", "failed judgements"), ("left_out", "trajectories left out")), 100),
        Plot("KL to the reference policy", "nats per token", (("kl", "KL"),)),
        Plot("Entropy", "nats per token", (("entropy", "entropy"),)),
        Plot("Clip fraction", "% of tokens", (("clip_fraction", "clipped"),), 100),
        Plot("Move of the policy in an iteration", "nats per token", (("approx_kl", "approximate KL"),)),
        Plot("Displacement", "mean log-ratio of better tokens", (("displacement", "displacement"),), from_zero=False),
        Plot("Critic", "explained variance", (("explained_variance", "explained"),), from_zero=False),
    ),
    "sft": (
        Plot("Loss", "nats per token", (("loss", "loss"),)),
        Plot("Token accuracy", "% of tokens", (("accuracy", "accuracy"),), 100),
    ),
}
STEP_NAMES = {"rl": "RL iteration", "sft": "optimizer step"}


class Curve(NamedTuple):
    """One line: block means of the log and, where there are enough, their moving mean."""

    name: str
    steps: list[float]
    values: list[float]
    smooth: list[float]  # equals values when the curve is too short to smooth
    block: int  # logged steps that a point is the mean of
    num_broken: int  # values that are not finite

    @property
    def is_smoothed(self) -> bool:
        return self.smooth != self.values


def read_curve(rows: Sequence[dict[str, Any]], metric: str, name: str, scale: float = 1.0) -> Curve:
    """The curve of a metric over `step`; rows without the metric are passed over."""
    points = [(row["step"], scale * row[metric]) for row in rows if row.get(metric) is not None]
    finite = [point for point in points if math.isfinite(point[1])]
    block = max(1, math.ceil(len(finite) / MAX_POINTS))
    blocks = [finite[i : i + block] for i in range(0, len(finite), block)]
    steps, values = ([_mean([p[axis] for p in b]) for b in blocks] for axis in (0, 1))
    return Curve(name, steps, values, moving_mean(values), block, len(points) - len(finite))


def moving_mean(values: Sequence[float]) -> list[float]:
    """Mean of the values near each one; fewer than 15 values stay unchanged.

    Centred, so that a rise stands where it happened: a running average would show it late. The
    window narrows towards the start, where curves are steep, and is cut off at the end, where they
    are noisy.
    """
    reach = len(values) // 20 + 2 if len(values) >= 15 else 0
    return [_mean(values[i - min(i, reach) : i + min(i, reach) + 1]) for i in range(len(values))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if len(values) > 1 else float(values[0])


def nice_ticks(low: float, high: float, count: int, *, is_whole: bool = False) -> list[float]:
    """About `count` numbers, 1, 2 or 5 times a power of ten apart, that enclose [low, high]."""
    if high <= low:  # a constant: from 0 to 1, or half its size to both sides
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    width = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    width = max(1.0, width) if is_whole else width
    slack = 1e-3  # of a tick, too little to see: -1e-9 needs no tick below 0
    first, last = math.floor(low / width + slack), math.ceil(high / width - slack)
    return [place * width for place in range(first, last + 1)]


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """The value with as many decimals as the ticks are apart."""
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return f"{value:.1e}" if decimals > 4 and value else f"{value:,.{min(decimals, 4)}f}"


class Frame:
    """Places values in the drawing; the template holds everything else. Units: SVG pixels."""

    width, height = 420, 216
    left, right, top, bottom = 46, 410, 22, 180

    def __init__(self, curves: Sequence[Curve], from_zero: bool):
        last = max(step for curve in curves for step in curve.steps)
        values = [value for curve in curves for value in curve.values] + [0.0] * from_zero
        self.y_ticks = nice_ticks(min(values), max(values), 5)
        self._last_step = max(last, 1)
        ticks = nice_ticks(0, self._last_step, 5, is_whole=True)
        self.x_ticks = [tick for tick in ticks if tick <= self._last_step]

    def x(self, step: float) -> float:
        return round(self.left + step / self._last_step * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(self.bottom - (value - low) / (high - low) * (self.bottom - self.top), 1)

    def path(self, steps: Sequence[float], values: Sequence[float]) -> str:
        points = (f"{self.x(s):g},{self.y(v):g}" for s, v in zip(steps, values, strict=True))
        return "M" + "L".join(points)

    def bands(self, curves: Sequence[Curve]) -> list[tuple[float, float, float, str]]:
        """For hovering: left edge, width, centre and text of a band around each step."""
        table: dict[float, list[str]] = {}
        for curve in curves:
            for step, value in zip(curve.steps, curve.values, strict=True):
                table.setdefault(step, []).append(f"{curve.name} {value:.4g}")
        steps = sorted(table)
        centres = [self.x(step) for step in steps]
        edges = [
            self.left,
            *((a + b) / 2 for a, b in itertools.pairwise(centres)),
            self.right,
        ]
        return [
            (
                edges[i],
                round(edges[i + 1] - edges[i], 2),
                centres[i],
                f"{step:g}: {', '.join(table[step])}",
            )
            for i, step in enumerate(steps)
        ]


def draw(plot: Plot, rows: Sequence[dict[str, Any]], step_name: str) -> Markup | None:
    """The plot as an HTML figure, or None when no row has one of its metrics."""
    read = [read_curve(rows, metric, name, plot.scale) for metric, name in plot.curves]
    curves = [curve for curve in read if curve.values]
    if not curves:
        return None
    frame = Frame(curves, plot.from_zero)
    template = environment().get_template("plot.html.j2")
    return Markup(template.render(plot=plot, curves=curves, frame=frame, step_name=step_name, tick_label=tick_label))


# ----------------------------------------------------------------------------------------- gallery


class Exhibit(NamedTuple):
    """A trajectory of the gallery and, if there is one, the other system's on the same question."""

    title: str  # which case it stands for
    main: Trajectory
    other: Trajectory | None
    num: int  # questions of this case


def gallery(run: Run) -> tuple[str, str, dict[str, list[Exhibit]]]:
    """The gallery's systems and, per question type, the first trajectory of each case.

    Cases are right and wrong, with a second system their four combinations. The first of a case in
    file order is shown: nothing is picked by hand. Without R3-RAG another system stands in.
    """
    have = [system for system in (*COMPARED, *run.trajectories) if run.trajectories.get(system)]
    if not have:
        return "", "", {}
    main, other = have[0], COMPARED[1]
    beside = {} if main == other else {t.question.id: t for t in run.trajectories.get(other, ())}
    cases: dict[str, dict[str, list[Trajectory]]] = {}
    for trajectory in run.trajectories[main]:
        of_type = cases.setdefault(str(trajectory.question.metadata.get("type", "all questions")), {})
        of_type.setdefault(_case(trajectory, beside.get(trajectory.question.id)), []).append(trajectory)
    exhibits = {
        kind: [_exhibit(case, found[case], beside) for case in CASES if case in found] for kind, found in cases.items()
    }
    return main, other if beside else "", exhibits


def _exhibit(case: str, found: Sequence[Trajectory], beside: dict[str, Trajectory]) -> Exhibit:
    return Exhibit(case, found[0], beside.get(found[0].question.id), len(found))


CASES = ("newly right", "right both times", "newly wrong", "wrong both times", "right", "wrong")


def _case(main: Trajectory, other: Trajectory | None) -> str:
    if other is None:
        return "right" if is_correct(main) else "wrong"
    if is_correct(main):
        return "right both times" if is_correct(other) else "newly right"
    return "newly wrong" if is_correct(other) else "wrong both times"


def milestones(run: Run) -> list[tuple[int, float, Trajectory]]:
    """The first rollout kept of the first, the middle and the last RL iteration."""
    iterations = sorted({iteration for iteration, _, _ in run.rollouts})
    chosen = {iterations[i] for i in (0, len(iterations) // 2, -1)} if iterations else set()
    first = {iteration: (iteration, reward, t) for iteration, reward, t in reversed(run.rollouts)}
    return [first[iteration] for iteration in sorted(chosen)]


# ------------------------------------------------------------------------------------------ report


def write_report(run_dir: Path | str) -> Path:
    """Writes report.html into the run directory and returns its path; UserError without a run."""
    run = load_run(run_dir)
    plots = {phase: _draw_all(phase, run.metrics.get(phase, ())) for phase in PLOTS}
    main, other, exhibits = gallery(run)
    titles = {e["system"]: title_of(e) for e in run.evals}
    html = (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            plots=plots,
            headline=headline(run.evals),
            exhibits=exhibits,
            milestones=milestones(run),
            main=titles.get(main, main),
            other=titles.get(other, other),
            facts_of=_phase_facts,
        )
    )
    path = Path(run_dir) / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def _draw_all(phase: str, rows: Sequence[dict[str, Any]]) -> list[Markup]:
    drawn = (draw(plot, rows, STEP_NAMES[phase]) for plot in PLOTS[phase])
    return [figure for figure in drawn if figure is not None]


def headline(evals: Sequence[dict[str, Any]]) -> str:
    """The run in a sentence: EM of R3-RAG and its distance to the other systems."""
    scores = {e["system"]: e["groups"]["all"]["em"] for e in evals if "all" in e["groups"]}
    if "r3rag" not in scores:
        return ""
    titles = {e["system"]: title_of(e) for e in evals}
    count = next(e["num_questions"] for e in evals if e["system"] == "r3rag")
    gaps = [
        f"{scores['r3rag'] - scores[system]:+.1f} points against {titles[system]}"
        for system in reversed(SYSTEMS[:-1])
        if system in scores
    ]
    sentence = f"{titles['r3rag']} answers {scores['r3rag']:.1f} % of {count:,} test questions exactly"
    return f"{sentence}: {', '.join(gaps)}." if gaps else f"{sentence}."


def _phase_facts(rows: Sequence[dict[str, Any]]) -> str:
    """Number of logged steps and median throughput, e.g. `40 steps · 5,400 tokens/s`."""
    rates = sorted(row["tokens_per_s"] for row in rows if row.get("tokens_per_s") is not None)
    facts = [f"{len(rows):,} steps"] + [f"{r:,.0f} tokens/s (median)" for r in rates[len(rates) // 2 :][:1]]
    return " · ".join(facts)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="e.g. runs/quickstart")
    print(write_report(parser.parse_args(argv).run_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())

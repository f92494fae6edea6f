"""Learning curves as SVG: which metrics are plotted together, their smoothing, bands of several runs, and the axes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from r3rag_jax.reporting.rendering import environment

MAX_POINTS = 160  # maximum points per curve; longer logs are averaged over blocks of consecutive rows


@dataclasses.dataclass(frozen=True)
class Plot:
    """One plot: metrics of a phase on a common axis."""

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]  # (metric, its name in the legend)
    scale: float = 1.0  # factor applied to the logged values
    from_zero: bool = True  # whether the value axis must include 0
    hides_zero: bool = False  # whether it is left out where all values are 0


PLOTS = {
    "rl": (
        Plot("Reward", "mean reward of a trajectory", (("reward", "reward"),), from_zero=False),
        Plot(
            "Reward components",
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
        Plot("Accuracy according to the judge", "% of questions", (("acc", "rollouts"),), 100),
        Plot("Retrievals", "searches per question", (("mean_retrievals", "retrievals"),)),
        Plot("Search time", "ms per batch", (("search_p50_s", "median"), ("search_p95_s", "95th percentile")), 1000),
        Plot("Failed search requests", "requests, repeated", (("search_failures", "failed"),), hides_zero=True),
        Plot(
            "Trajectories without an answer",
            "% of trajectories",
            (
                ("no_answer_rate", "out of steps"),
                ("context_full_rate", "context full"),
                ("format_error_rate", "malformed step"),
            ),
            100,
        ),
        Plot(
            "Signs of a collapse",
            "%",
            (
                ("repeated_query_rate", "queries repeated"),
                ("equal_groups", "questions whose samples have equal rewards"),
            ),
            100,
        ),
        Plot("Length", "sampled tokens per trajectory", (("trajectory_tokens", "tokens"),)),
        Plot("Judge", "%", (("judge_failure_rate", "failed judgements"), ("left_out", "trajectories left out")), 100),
        Plot("KL to the reference policy", "nats per token", (("kl", "KL"),)),
        Plot("Entropy", "nats per token", (("entropy", "entropy"),)),
        Plot("Clip fraction", "% of tokens", (("clip_fraction", "clipped"),), 100),
        Plot("Policy change in an iteration", "nats per token", (("approx_kl", "approximate KL"),)),
        Plot("Displacement", "mean log-ratio of better tokens", (("displacement", "displacement"),), from_zero=False),
        Plot("Critic", "explained variance", (("explained_variance", "explained"),), from_zero=False),
        Plot("Throughput", "tokens per second", (("tokens_per_s", "trained on"), ("decoded_per_s", "sampled"))),
        Plot(
            "Use of the devices",
            "% of the data sheet's peak",
            (("mfu", "FLOPs, updates (MFU)"), ("memory_bandwidth", "memory bandwidth, decoding")),
            100,
        ),
        Plot("Staleness", "iterations", (("staleness", "age of the policy that sampled"),), hides_zero=True),
    ),
    "sft": (
        Plot("Loss", "nats per token", (("loss", "loss"),)),
        Plot("Token accuracy", "% of tokens", (("accuracy", "accuracy"),), 100),
        Plot("Throughput", "tokens per second", (("tokens_per_s", "trained on"),)),
        Plot("Use of the devices", "% of the data sheet's peak", (("mfu", "FLOPs (MFU)"),), 100),
    ),
}
STEP_NAMES = {"rl": "RL iteration", "sft": "optimizer step"}


Row = Mapping[str, Any]


class Curve(NamedTuple):
    """One line of a plot: block means of the logged values and, if there are enough, their moving mean."""

    name: str
    steps: list[float]
    values: list[float]
    smooth: list[float]  # equals `values` if the curve is too short to smooth
    block: int  # number of logged rows averaged in a point
    num_broken: int  # number of values that are not finite
    band: tuple[Sequence[float], Sequence[float]] | None = None  # lowest and highest value of several runs at each step
    is_expected: bool = False  # drawn behind the run's own curves

    @property
    def is_smoothed(self) -> bool:
        return self.smooth != self.values

    @property
    def extremes(self) -> list[float]:
        """What the value axis must show."""
        return [*self.values, *(value for side in self.band or () for value in side)]


def read_curve(rows: Sequence[Row], metric: str, name: str, scale: float = 1.0) -> Curve:
    """The curve of a metric over `step`; rows without the metric are skipped."""
    points = [(row["step"], scale * row[metric]) for row in rows if row.get(metric) is not None]
    finite = [point for point in points if math.isfinite(point[1])]
    block = max(1, math.ceil(len(finite) / MAX_POINTS))
    blocks = [finite[i : i + block] for i in range(0, len(finite), block)]
    steps, values = ([_mean([p[axis] for p in b]) for b in blocks] for axis in (0, 1))
    return Curve(name, steps, values, moving_mean(values), block, len(points) - len(finite))


def read_band(runs: Sequence[Sequence[Row]], metric: str, name: str, scale: float = 1.0) -> Curve:
    """The mean of several runs' metric at each step that any of them has, with the lowest and the highest value.

    Each run is smoothed by itself, so that the band is of runs, not of the noise of steps.
    """
    points: dict[float, list[float]] = {}
    for rows in runs:
        found = [(row["step"], scale * row[metric]) for row in rows if row.get(metric) is not None]
        finite = [point for point in found if math.isfinite(point[1])]
        for (step, _), value in zip(finite, moving_mean([value for _, value in finite]), strict=True):
            points.setdefault(step, []).append(value)
    steps = sorted(points)[:: max(1, math.ceil(len(points) / MAX_POINTS))]
    means, low, high = ([summary(points[step]) for step in steps] for summary in (_mean, min, max))
    has_several = any(len(values) > 1 for values in points.values())
    return Curve(name, steps, means, means, 1, 0, (low, high) if has_several else None)


def moving_mean(values: Sequence[float]) -> list[float]:
    """Centred moving mean; fewer than 15 values are returned unchanged.

    A trailing mean would show a rise too late. The window narrows towards the start, where curves are steep, and is
    cut off at the end, where curves are noisy.
    """
    reach = len(values) // 20 + 2 if len(values) >= 15 else 0
    return [_mean(values[i - min(i, reach) : i + min(i, reach) + 1]) for i in range(len(values))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if len(values) > 1 else float(values[0])


def nice_ticks(low: float, high: float, count: int, *, is_whole: bool = False) -> list[float]:
    """About `count` ticks whose spacing is 1, 2 or 5 times a power of ten and which enclose [low, high]."""
    if high <= low:  # a constant curve: the axis extends by half the value on both sides, or from 0 to 1 for 0
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    width = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    width = max(1.0, width) if is_whole else width
    slack = 1e-3  # fraction of a tick, invisible: a value of -1e-9 needs no tick below 0
    first, last = math.floor(low / width + slack), math.ceil(high / width - slack)
    return [number * width for number in range(first, last + 1)]


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """The value with the number of decimals that the spacing of the ticks needs."""
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return f"{value:.1e}" if decimals > 4 and value else f"{value:,.{min(decimals, 4)}f}"


def short(value: float) -> str:
    """A value in three digits, or as many as it has before the point."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


class Frame:
    """Converts steps and values to SVG pixels; the template draws everything else."""

    width, height = 420, 216
    left, right, top, bottom = 46, 410, 22, 180

    def __init__(self, curves: Sequence[Curve], from_zero: bool):
        last = max(step for curve in curves for step in curve.steps)
        values = [value for curve in curves for value in curve.extremes] + [0.0] * from_zero
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

    def area(self, curve: Curve) -> str:
        """The outline of a curve's band."""
        low, high = curve.band or ((), ())
        back = self.path(curve.steps[::-1], high[::-1]).replace("M", "L", 1)
        return f"{self.path(curve.steps, low)}{back}Z"

    def bands(self, curves: Sequence[Curve]) -> list[tuple[float, float, float, str]]:
        """Vertical bands for tooltips, one per step: left edge, width, centre and text."""
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


def draw(plot: Plot, rows: Sequence[Row], step_name: str, expected: Sequence[Sequence[Row]] = ()) -> Markup | None:
    """The plot as an HTML figure; None if no row has one of its metrics.

    `expected`: the rows of other runs of the same recipe, whose range is drawn behind.
    """
    curves = []
    for metric, name in plot.curves:
        curve = read_curve(rows, metric, name, plot.scale)
        band = read_band(expected, metric, f"{name}, expected", plot.scale)
        curves += [curve] if curve.values else []
        curves += [band._replace(is_expected=True)] if curve.values and band.values else []
    if plot.hides_zero and not any(value for curve in curves for value in curve.values):
        return None
    return draw_curves(plot, curves, step_name) if curves else None


def draw_curves(plot: Plot, curves: Sequence[Curve], step_name: str) -> Markup:
    """Curves, each with at least one value, as an HTML figure."""
    frame = Frame(curves, plot.from_zero)
    template = environment().get_template("plot.html.j2")
    return Markup(
        template.render(plot=plot, curves=curves, frame=frame, step_name=step_name, tick_label=tick_label, short=short)
    )

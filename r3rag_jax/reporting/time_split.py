"""Where the time of RL iterations went, as stacked bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from r3rag_jax.reporting.curves import Frame, nice_ticks, tick_label
from r3rag_jax.reporting.rendering import environment
from r3rag_jax.run.glossary import TIME_PARTS
from r3rag_jax.run.status_lines import time_shares

MAX_BARS = 80  # longer logs are averaged over blocks of consecutive iterations
PARTS = (*TIME_PARTS.values(), "waiting for rollouts", "other")


class Part(NamedTuple):
    """A part of the time: its colour, name, share of all iterations and seconds an iteration."""

    number: int
    name: str
    share: float
    seconds: float


class Bar(NamedTuple):
    """One bar: (number of the part, top, height) from below, and its text."""

    x: float
    width: float
    segments: list[tuple[int, float, float]]
    text: str


def draw_time_split(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The figure; None if no iteration says where its time went."""
    timed = [row for row in rows if row.get("iteration_s")]
    if not timed:
        return None
    split = [_seconds(row) for row in timed]
    block = math.ceil(len(timed) / MAX_BARS)
    blocks = [(timed[i]["step"], _mean(split[i : i + block])) for i in range(0, len(timed), block)]
    ticks = nice_ticks(0, max(sum(seconds.values()) for _, seconds in blocks), 4)
    total = _mean(split)
    parts = [
        Part(number, name, total[name] / sum(total.values()), total[name])
        for number, name in enumerate(PARTS)
        if total.get(name, 0) > 0
    ]
    template = environment().get_template("split.html.j2")
    return Markup(
        template.render(
            parts=parts, bars=_bars(blocks, ticks[-1], block), block=block, frame=Frame, ticks=ticks,
            tick_label=tick_label, top_of=lambda value: _y(value, ticks[-1]),
            first=blocks[0][0], last=timed[-1]["step"],
        )
    )  # fmt: skip


def _seconds(row: Mapping[str, Any]) -> dict[str, float]:
    whole = row["iteration_s"] + row.get("checkpoint_s", 0.0)
    return {name: whole * share for name, share in time_shares(row).items()}


def _mean(split: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(seconds.get(name, 0.0) for seconds in split) / len(split) for name in PARTS}


def _y(value: float, highest: float) -> float:
    return round(Frame.bottom - value / highest * (Frame.bottom - Frame.top), 2)


def _bars(blocks: Sequence[tuple[int, Mapping[str, float]]], highest: float, block: int) -> list[Bar]:
    width = (Frame.right - Frame.left) / len(blocks)
    bars = []
    for place, (step, seconds) in enumerate(blocks):
        segments, below = [], 0.0
        for number, name in enumerate(PARTS):
            if value := seconds.get(name, 0.0):
                top = _y(below + value, highest)
                segments.append((number, top, round(_y(below, highest) - top, 2)))
                below += value
        steps = f"{step}" if block == 1 else f"{step} to {step + block - 1}"
        shown = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items() if value)
        bars.append(
            Bar(round(Frame.left + place * width, 2), round(max(1.0, width - 1), 2), segments, f"{steps}: {shown}")
        )
    return bars

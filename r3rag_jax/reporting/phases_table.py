"""Time, throughput and memory of each phase, of one run or in the mean of several."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from r3rag_jax.reporting.rendering import visible
from r3rag_jax.reporting.run_files import Logs
from r3rag_jax.run.status_lines import duration
from r3rag_jax.sampler.memory import GIB

TITLES = {"index": "Index", "sft": "Cold start", "rl": "RL", "eval": "Evaluation"}
COLUMNS = ("time", "trained tokens/s", "sampled tokens/s", "device GiB", "host GiB")
UNKNOWN = "—"
CAPTION = (
    "Trained: median over the steps; prompts and passages count. Sampled: over all of the phase's time.\n"
    "Memory: the most that was held until the end of the phase, by a device and by the process."
)


class Phases(NamedTuple):
    """What the phases took, as text.

    Fields:
        devices: kind and number of those that the runs were on, e.g. `8 x NVIDIA H100`.
        columns: those of COLUMNS of which a phase has a number.
        rows: a phase's title and its numbers in the order of the columns; — for what was not measured.
    """

    devices: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def phases_of(runs: Sequence[Logs]) -> Phases:
    """A row for each phase that all runs have recorded: means over the runs.

    Of memory the least of the runs: each number is an upper bound, for a process may have done other phases before.
    """
    devices = ", ".join(sorted({cost.devices for run in runs for cost in run.phases.values()}))
    phases = [phase for phase in TITLES if runs and all(phase in run.phases for run in runs)]
    rows = [(TITLES[phase], *_cells(phase, runs)) for phase in phases]
    known = [number for number in range(len(COLUMNS)) if any(row[1 + number] != UNKNOWN for row in rows)]
    columns = tuple(COLUMNS[number] for number in known)
    return Phases(devices, columns, tuple((row[0], *(row[1 + number] for number in known)) for row in rows))


def phases_table(runs: Sequence[Logs]) -> Table | None:
    """`phases_of` the runs for a terminal; None without a row."""
    phases = phases_of(runs)
    if not phases.rows:
        return None
    title, caption = (Text(visible(text)) for text in (f"Phases on {phases.devices}", CAPTION))
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=None)
    table.add_column("")
    for name in phases.columns:
        table.add_column(name, justify="right")
    for row in phases.rows:
        table.add_row(*row)
    return table


def _cells(phase: str, runs: Sequence[Logs]) -> list[str]:
    costs = [run.phases[phase] for run in runs]
    trained = [rate for run in runs if (rate := _trained_rate(run.metrics.get(phase, ()))) is not None]
    device = [cost.device_bytes for cost in costs if cost.device_bytes is not None]
    return [
        duration(statistics.mean(cost.seconds for cost in costs)),
        _number(statistics.mean(trained) if trained else None, 0),
        _number(statistics.mean(cost.sampled / cost.seconds if cost.sampled else 0 for cost in costs) or None, 0),
        _number(min(device) / GIB if device else None, 1),
        _number(min(cost.host_bytes for cost in costs) / GIB, 1),
    ]


def _trained_rate(rows: Sequence[dict[str, Any]]) -> float | None:
    rates = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s") is not None]
    return statistics.median(rates) if rates else None


def _number(value: float | None, decimals: int) -> str:
    return UNKNOWN if value is None else f"{value:,.{decimals}f}"

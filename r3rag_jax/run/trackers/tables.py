"""Trajectories as rows of a table, for trackers that show tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("question", "gold", "answer", "status", "reward", "searches", "steps")


def table_row(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The cells of a trajectory, a JSON object of `recorded_rows`, under COLUMNS; what it does not hold is ""."""
    steps = row.get("steps", [])
    answer = steps[-1].get("answer", "") if steps else ""
    searches = sum("query" in step for step in steps)
    gold = " / ".join(row.get("golden_answers", ()))
    return (
        row.get("question", ""), gold, answer, row.get("status", ""), row.get("reward", ""), searches,
        "\n".join(map(step_text, steps)),
    )  # fmt: skip


def step_text(step: Mapping[str, Any]) -> str:
    """A step in lines: the analysis, the query and what it found, or the answer."""
    lines = [str(step.get("analysis", ""))]
    lines += [f"{name}: {step[name]}" for name in ("query", "answer") if name in step]
    lines += [f"found: {passage['contents'].partition(chr(10))[0]}" for passage in step.get("passages", ())]
    return "\n".join(lines)

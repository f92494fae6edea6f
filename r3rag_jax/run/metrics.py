"""The metrics of a run: `metrics.jsonl`, which everything else reads, and the trackers that receive a copy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from r3rag_jax.run.files import append_rows, keep_rows
from r3rag_jax.run.trackers.base import Tracker


class MetricsLog:
    """Appends one JSON object per step to `metrics.jsonl` and forwards it to trackers. Only process 0 writes.

    As a context manager it finishes the trackers, also after an exception.
    """

    def __init__(self, path: Path, trackers: Sequence[Tracker] = ()):
        """Args: `path` of `metrics.jsonl`, whose directory exists at the first write; `trackers` that get a copy."""
        self.path = path
        self._trackers = tuple(trackers)
        self._started = time.monotonic()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def write(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of a step.

        Args:
            phase: `sft` or `rl`; trackers see it as the prefix of every name, e.g. `rl/reward`.
            step: number of the update (sft) or of the iteration (rl), from 0.
            metrics: numbers, or arrays of one number.
        """
        if jax.process_index() != 0:
            return
        time_s = round(time.monotonic() - self._started, 3)
        values = {"time_s": time_s} | {name: float(value) for name, value in metrics.items()}
        append_rows(self.path, [{"phase": phase, "step": step, **values}])
        for tracker in self._trackers:
            tracker.log(step, {f"{phase}/{name}": value for name, value in values.items()})

    def rewind(self, phase: str, step: int) -> None:
        """Drop the lines of a phase at or after `step`, which a resumed phase is about to repeat.

        Lines that are no rows of metrics, such as a half-written one, are dropped, too. Trackers keep what they
        received.
        """
        if jax.process_index() != 0 or not self.path.exists():
            return

        def is_kept(row: dict[str, Any]) -> bool:
            own_phase, own_step = row.get("phase"), row.get("step")
            return isinstance(own_phase, str) and isinstance(own_step, int) and (own_phase != phase or own_step < step)

        keep_rows(self.path, is_kept)

    def finish(self) -> None:
        """Close the trackers; nothing may be written afterwards."""
        if jax.process_index() == 0:
            for tracker in self._trackers:
                tracker.finish()

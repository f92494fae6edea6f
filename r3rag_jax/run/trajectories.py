"""The trajectories that RL keeps while it trains: some of every iteration, for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from r3rag_jax.run.files import append_rows, keep_rows
from r3rag_jax.run.trackers.base import Tracker


class TrajectoryLog:
    """Appends trajectories of RL iterations to `trajectories/rl.jsonl` and forwards them to trackers.

    Only process 0 writes. The trackers are finished by whoever made them (see `MetricsLog`).
    """

    def __init__(self, path: Path, limit: int, trackers: Sequence[Tracker] = ()):
        """Args: `path` of the JSONL file; `limit`, about how many trajectories of an iteration are kept, 0 for none."""
        self.path = path
        self._limit = limit
        self._trackers = tuple(trackers)

    def choose(self, num_trajectories: int) -> Sequence[int]:
        """Indices of the trajectories of an iteration to write, evenly spaced; none where this process writes none.

        There are fewer than twice `limit`: the spacing is a whole number.
        """
        if not self._is_writer:
            return range(0)
        return range(0, num_trajectories, max(1, num_trajectories // self._limit))

    def write(self, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record trajectories of an iteration.

        Args:
            iteration: number of the RL iteration, from 0; added to every row.
            rows: JSON objects of `data.trajectories.trajectory_to_dict`, with the trajectory's `reward`.
        """
        if not self._is_writer:
            return
        rows = [{**row, "iteration": iteration} for row in rows]
        self.path.parent.mkdir(exist_ok=True)
        append_rows(self.path, rows)
        for tracker in self._trackers:
            tracker.trajectories(iteration, rows)

    def rewind(self, iteration: int) -> None:
        """Drop the trajectories of iterations that a resumed phase is about to repeat, and lines that are none of RL's.

        The file is for people: RL resumes whatever it holds.
        """
        if jax.process_index() == 0 and self.path.exists():
            keep_rows(self.path, lambda row: isinstance(row.get("iteration"), int) and row["iteration"] < iteration)

    @property
    def _is_writer(self) -> bool:
        return self._limit > 0 and jax.process_index() == 0

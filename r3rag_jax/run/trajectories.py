"""The trajectories that RL keeps while it trains: some of every iteration, for people to read."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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

    def choose(self, groups: Sequence[Hashable]) -> Sequence[int]:
        """Indices of the trajectories of an iteration to write; none where this process writes none.

        They are whole groups, evenly spaced in order of their first trajectory: about `limit` trajectories, and at
        least one group.

        Args:
            groups: for each trajectory its question; those with the same one are compared.
        """
        members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        if not self._is_writer or not members:
            return []
        num_groups = max(1, self._limit * len(members) // len(groups))
        chosen = list(members.values())[:: max(1, len(members) // num_groups)]
        return [index for group in chosen for index in group]

    def write(self, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record trajectories of an iteration.

        Args:
            iteration: number of the RL iteration, from 0; added to every row.
            rows: JSON objects as `training.recorded.recorded_rows` makes them.
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

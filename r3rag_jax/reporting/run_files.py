"""Reads the files of a run directory for the report: metrics, evaluations, trajectories."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from r3rag_jax.data.trajectories import trajectory_from_dict
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.evaluation.tables.table import Table
from r3rag_jax.json_text import parse_json
from r3rag_jax.reporting.paper_tables import table_from_json
from r3rag_jax.run.directory import RL_TRAJECTORIES, RunDirectory
from r3rag_jax.run.phases import PhaseCost, phase_costs
from r3rag_jax.types import Trajectory


class Rollout(NamedTuple):
    """A trajectory that RL kept."""

    iteration: int
    reward: float
    trajectory: Trajectory
    row: dict[str, Any]  # as recorded; see `training/recorded.py`


class Logs(NamedTuple):
    """What a run logs of its phases."""

    metrics: dict[str, list[dict[str, Any]]]  # phase -> rows of metrics.jsonl, sorted by step
    phases: dict[str, PhaseCost]  # phase -> what it took


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of a run directory, finished or not."""

    name: str
    config: str  # text of config.yaml, "" if there is none
    metrics: dict[str, list[dict[str, Any]]]  # phase -> rows of metrics.jsonl, sorted by step
    phases: dict[str, PhaseCost]  # phase -> what it took
    evals: list[dict[str, Any]]  # contents of eval/*.json, baselines first
    trajectories: dict[str, list[Trajectory]]  # system -> trajectories of its evaluation
    rollout_rows: list[Rollout]  # the trajectories that RL keeps, by iteration
    tables: list[Table]  # of `python -m r3rag_jax.evaluate table`
    notices: tuple[str, ...]  # sentences about lines and files that could not be read

    @property
    def rollouts(self) -> list[tuple[int, float, Trajectory]]:
        """(RL iteration, reward, trajectory) of those that RL keeps."""
        return [(rollout.iteration, rollout.reward, rollout.trajectory) for rollout in self.rollout_rows]


def load_run(run_dir: str | os.PathLike[str]) -> Run:
    """Read a run directory, finished or not.

    Raises:
        UserError: `run_dir` is not a run directory.
    """
    run = RunDirectory(Path(run_dir))
    if not (run.config_file.is_file() or run.metrics_file.is_file()):
        raise UserError(f"expected a run directory with config.yaml or metrics.jsonl; got {run.path}")
    notices: list[str] = []
    metrics, phases = read_logs(run, notices)
    trajectories, rollouts = {}, list[Rollout]()
    for path in sorted(run.trajectory_dir.glob("*.jsonl")):
        read = list(_trajectories(path, notices))
        if path.stem == RL_TRAJECTORIES:
            rollouts = [
                Rollout(row["iteration"], row["reward"], trajectory, row)
                for row, trajectory in read
                if isinstance(row.get("iteration"), int) and isinstance(row.get("reward"), int | float)
            ]
        else:
            trajectories[path.stem] = [trajectory for _, trajectory in read]
    return Run(
        name=run.path.resolve().name,
        config=run.config_file.read_text(encoding="utf-8") if run.config_file.is_file() else "",
        metrics=metrics,
        phases=phases,
        evals=_evals(run.evaluation_dir, notices),
        trajectories=trajectories,
        rollout_rows=sorted(rollouts, key=lambda rollout: rollout.iteration),
        tables=_tables(run.path / "tables", notices),
        notices=tuple(notices),
    )


def read_logs(run: RunDirectory, notices: list[str]) -> Logs:
    """What a run has logged so far; what cannot be read becomes notices."""
    metrics: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(run.metrics_file, notices):
        if isinstance(row.get("phase"), str) and isinstance(row.get("step"), int):
            metrics.setdefault(row["phase"], []).append(row)
    for rows in metrics.values():
        rows.sort(key=lambda row: row["step"])
    return Logs(metrics, phase_costs(_rows(run.phases_file, notices)))


def _rows(path: Path, notices: list[str]) -> Iterable[dict[str, Any]]:
    """The objects of a JSONL file, none if it is missing; invalid lines (a run may be writing one) become notices."""
    if not path.is_file():
        return
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")  # a text may hold other characters that end lines
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line.decode("utf-8", errors="replace"))
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield row
        elif lines != [b""]:
            notices.append(f"{path.name}: line {number} is not JSON and was left out.")


def _trajectories(path: Path, notices: list[str]) -> Iterable[tuple[dict[str, Any], Trajectory]]:
    for number, row in enumerate(_rows(path, notices), 1):
        try:
            yield row, trajectory_from_dict(row)
        except ValueError as error:
            notices.append(f"{path.name}: object {number} was left out: {error}.")


def _evals(folder: Path, notices: list[str]) -> list[dict[str, Any]]:
    order = {system: index for index, system in enumerate(SYSTEMS)}  # systems that SYSTEMS lacks come last
    evals = []
    for path in sorted(folder.glob("*.json"), key=lambda p: (order.get(p.stem, len(order)), p.stem)):
        try:
            evals.append(parse_json(path.read_text(encoding="utf-8")))
        except ValueError:
            notices.append(f"eval/{path.name} is not JSON and was left out.")
    return evals


def _tables(folder: Path, notices: list[str]) -> list[Table]:
    tables = []
    for path in sorted(folder.glob("*.json")):
        try:
            tables.append(table_from_json(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError):
            notices.append(f"tables/{path.name} is no table of this version and was left out.")
    return tables

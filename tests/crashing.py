"""Trains as `python -m r3rag_jax.train` does, and is killed at a named point: `python crashing.py POINT --config …`.

With `full:FILE` the disk is full at the first write to a place that FILE does not list; the place is added to it.

SIGKILL comes from the process itself, so that it comes nowhere else. Each point is of one run, in the order in which a
run passes them; a run that has passed it already ends as it would without.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r3rag_jax import train
from r3rag_jax.evaluation.dev import DevEvaluation
from r3rag_jax.rollout import scheduler, times
from r3rag_jax.run import files, metrics, trajectories
from r3rag_jax.run.checkpoints import Checkpoints
from r3rag_jax.training import rl, sft
from r3rag_jax.training.experience import IterationSampler, Rollouts
from r3rag_jax.training.trainer import RLTrainer

Matches = Callable[..., bool]
FULL = "full"  # in the list of places: one write of this process has failed


def die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, matches: Matches = lambda *_, **__: True) -> None:
    """Die when a function is called with arguments that match."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def patched(*args: Any, **named: Any) -> Any:
        if matches(*args, **named):
            die()
        return function(*args, **named)

    setattr(owner, name, patched)


def after(owner: Any, name: str, matches: Matches = lambda *_, **__: True) -> None:
    """Die when such a call has returned."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def patched(*args: Any, **named: Any) -> Any:
        result = function(*args, **named)
        if matches(*args, **named):
            die()
        return result

    setattr(owner, name, patched)


def rename(when: Callable[..., None], end: str) -> None:
    """Die before or after a file or a directory gets its name, which ends so."""
    for name in ("rename", "replace"):
        when(os, name, lambda source, target, *_, **__: str(target).endswith(end))


def half_a_line(owner: Any, name: str, number: int) -> None:
    """Die when half of a line is in a file that grows, of the step or iteration `number`."""

    def patched(path: Path, rows: Any) -> None:
        rows = list(rows)
        if rows and rows[0].get("step", rows[0].get("iteration")) == number and name in path.name:
            with path.open("a") as file:
                file.write(json.dumps(rows[0])[:40])
            die()
        files.append_rows(path, rows)

    owner.append_rows = patched


def full_disk(seen: Path, run: Path) -> None:
    """Have one write into the run directory fail, with half a line where a file grows by lines.

    Places are told apart but for numbers in their names: of all checkpoints of a phase one fails.
    """
    known = seen.read_text().splitlines() if seen.exists() else []

    def write(target: Any) -> None:
        path = Path(target)
        name = re.sub(r"\d+", "N", path.relative_to(run).as_posix()) if path.is_relative_to(run) else ""
        if name and name not in known and not known.count(FULL):
            known.extend([name, FULL])
            with seen.open("a") as file:
                file.write(f"{name}\n")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def failing(move: Callable[..., None]) -> Callable[..., None]:
        def patched(source: Any, target: Any, *args: Any, **named: Any) -> None:
            write(target)
            move(source, target, *args, **named)

        return patched

    def append(path: Path, rows: Any) -> None:
        rows = list(rows)
        try:
            write(path)
        except OSError:
            with path.open("a") as file:
                file.write(json.dumps(rows[0])[:40])
            raise
        append_rows(path, rows)

    append_rows = files.append_rows
    os.rename, os.replace = failing(os.rename), failing(os.replace)
    metrics.append_rows = trajectories.append_rows = append  # type: ignore[attr-defined]


def nth(number: int) -> Matches:
    """Matches the call of this number, from 1."""
    left = iter(range(1, 10**9))
    return lambda *_, **__: next(left) == number


def half_deleted(end: str) -> None:
    """Die when the first file of a directory that is deleted is gone."""
    delete = shutil.rmtree

    def patched(path: Any, *args: Any, **named: Any) -> None:
        if str(path).endswith(end) and Path(path).exists():
            next(file for file in sorted(Path(path).rglob("*")) if file.is_file()).unlink()
            die()
        delete(path, *args, **named)

    shutil.rmtree = patched  # type: ignore[assignment]


def of_iteration(number: int) -> Matches:
    """Of a method of the trainer."""
    return lambda trainer, *_, **__: trainer.iteration == number


# Name -> installs it, in the order of a run of SETTINGS in test_crashes.py.
POINTS: dict[str, Callable[[], None]] = {
    "before config.yaml": lambda: rename(before, "/config.yaml"),
    "before data/corpus.jsonl": lambda: rename(before, "data/corpus.jsonl"),
    "after data/rl.jsonl": lambda: rename(after, "data/rl.jsonl"),
    "before the index": lambda: rename(before, "/index"),
    "after the index": lambda: rename(after, "/index"),
    "before data/sft.jsonl": lambda: rename(before, "data/sft.jsonl"),
    "before the digests of the data": lambda: rename(before, "data/SHA256SUMS"),
    "after phase index": lambda: before(train, "run_sft"),
    "before the first step": lambda: before(sft, "make_sft_step"),
    "half a line of metrics": lambda: half_a_line(metrics, "metrics", 3),
    "a step without its checkpoint": lambda: before(Checkpoints, "save", lambda c, step, *_, **__: step == 4),
    "inside a save": lambda: after(Checkpoints, "save", lambda c, step, *_, **__: step == 4),
    "before a checkpoint has its name": lambda: rename(before, "sft/4"),
    "after a checkpoint has its name": lambda: rename(after, "sft/4"),
    "an old checkpoint is half deleted": lambda: half_deleted("checkpoints/sft/2"),
    "before policy/sft": lambda: rename(before, "policy/sft"),
    "after policy/sft": lambda: rename(after, "policy/sft"),
    "before rollouts": lambda: before(IterationSampler, "run"),
    "at a search": lambda: before(times, "search_hits", nth(2)),
    "before the rewards": lambda: before(Rollouts, "score"),
    "before an update": lambda: before(RLTrainer, "update", of_iteration(1)),
    "before an evaluation on dev": lambda: before(DevEvaluation, "__call__"),
    "after an update": lambda: after(RLTrainer, "update", of_iteration(2)),
    "before trajectories": lambda: before(
        rl, "log_trajectories", lambda config, parts, iteration, *_, **__: iteration == 1
    ),
    "half a line of trajectories": lambda: half_a_line(trajectories, "rl", 1),
    "before a save of RL": lambda: before(RLTrainer, "save", of_iteration(2)),
    "inside a save of RL": lambda: after(RLTrainer, "save", of_iteration(2)),
    "before a checkpoint of RL": lambda: rename(before, "rl/2"),
    "after a checkpoint of RL": lambda: rename(after, "rl/2"),
    "before policy/rl": lambda: rename(before, "policy/rl"),
    "after policy/rl": lambda: rename(after, "policy/rl"),
    "during an evaluation": lambda: after(scheduler._Scheduler, "_finish", nth(2)),
    "before trajectories/r3rag.jsonl": lambda: rename(before, "trajectories/r3rag.jsonl"),
    "before eval/r3rag.questions.jsonl": lambda: rename(before, "eval/r3rag.questions.jsonl"),
    "before eval/r3rag.json": lambda: rename(before, "eval/r3rag.json"),
    "before report.html": lambda: rename(before, "/report.html"),
    "after report.html": lambda: rename(after, "/report.html"),
}


if __name__ == "__main__":
    if sys.argv[1].startswith("full:"):
        full_disk(Path(sys.argv[1].removeprefix("full:")), Path(sys.argv[3]).parent / "run")
    elif sys.argv[1]:
        POINTS[sys.argv[1]]()
    sys.exit(train.main(sys.argv[2:]))

"""What killed processes leave in a run directory, and what it lacks: removed, and said, when the run is started again.

A process that is killed leaves what it had not finished: files and directories `.NAME.…partial` (`files.py`), half a
checkpoint. Nothing reads them. Those of a process that still works, e.g. an evaluation beside the run, stay.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from r3rag_jax.json_text import parse_json
from r3rag_jax.run.files import SUFFIX, is_partial
from r3rag_jax.run.lock import HELD, is_alive
from r3rag_jax.run.store import CHECKPOINTS

OLD_S = 3600.0  # an unfinished file of another host that has not changed for so long is of a dead process, in seconds
OWNER = re.compile(rf"(?P<host>.+)-(?P<pid>\d+){re.escape(SUFFIX)}$")
UNFINISHED = "*.orbax-checkpoint-tmp*"  # what orbax names a checkpoint that is not complete
LOCK = ".lock"  # in the directory of an index while it is built
MAX_SHOWN = 5  # names in a message

Say = Callable[[str], object]


def remove_leftovers(run: Path, index: Path, say: Say) -> None:
    """Remove what killed processes have left in a run directory that this process holds, and say so.

    Args:
        index: the directory of the run's own index. One that is half built is kept, to be continued, until there is a
            whole one.
    """
    found = sorted(_leftovers(run, index))
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    removed = [path.relative_to(run).as_posix() for path in found if not path.exists()]
    if removed:
        more = f" and {len(removed) - MAX_SHOWN} more" if len(removed) > MAX_SHOWN else ""
        say(f"removed what a killed process had left in {run}: {', '.join(removed[:MAX_SHOWN])}{more}")


def report_lost_metrics(run: Path, metrics: Path, say: Say) -> None:
    """Say which finished phases have no line in `metrics.jsonl`, or lack one between two others."""
    for policy in sorted(run.glob("policy/[!.]*")):
        last = max(_steps(metrics, policy.name), default=None)
        if last is None:
            say(f"{metrics} has no line of phase {policy.name}, which is finished: they were removed or damaged")
        else:
            report_gaps(metrics, policy.name, last + 1, say)


def report_damaged(path: Path, say: Say) -> None:
    """Say which lines of a file of JSON objects, one a line, hold none; they are about to be dropped."""
    damaged = [number for number, row in _rows(path) if row is None]
    if damaged:
        shown = ", ".join(map(str, damaged[:MAX_SHOWN])) + (", …" if len(damaged) > MAX_SHOWN else "")
        say(f"{path}: {len(damaged)} lines hold no JSON object and are dropped ({shown}): cut off, or damaged")


def report_gaps(metrics: Path, phase: str, num_steps: int, say: Say) -> None:
    """Say which of the first steps of a phase have no line in `metrics.jsonl`; the run goes on without them."""
    seen = set(_steps(metrics, phase))
    missing = [step for step in range(num_steps) if step not in seen]
    if missing:
        shown = ", ".join(map(str, missing[:MAX_SHOWN])) + (", …" if len(missing) > MAX_SHOWN else "")
        say(
            f"{metrics} lacks {len(missing)} of {num_steps} steps of phase {phase} ({shown}): their lines were removed "
            "or damaged; the run goes on, its curves have a gap"
        )


def _steps(metrics: Path, phase: str) -> Iterator[int]:
    """The steps of a phase that have a line."""
    for _, row in _rows(metrics):
        if row is not None and row.get("phase") == phase and type(row.get("step")) is int:
            yield row["step"]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and object of each line of a file, None where it holds none; nothing where there is no file."""
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n") if path.exists() and path.stat().st_size else []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line.decode("utf-8"))
        except ValueError:
            row = None
        yield number, row if isinstance(row, dict) else None


def _leftovers(run: Path, index: Path) -> Iterator[Path]:
    yield from run.glob(f"policy/.*{SUFFIX}")  # the process that holds the run alone writes policies and checkpoints
    yield from run.glob(f"{CHECKPOINTS}/*/{UNFINISHED}")
    building = [index.with_name(f".{index.name}{SUFFIX}"), index.with_name(f".{index.name}.old{SUFFIX}")]
    for path in building:
        if path.parent == run and path.is_dir() and index.is_dir() and not _is_locked(path / LOCK):
            yield path
    for directory, names, files in os.walk(run):
        place = Path(directory)
        names[:] = [name for name in names if not is_partial(place / name) and place != run / CHECKPOINTS]
        yield from (place / name for name in files if is_partial(place / name) and _is_abandoned(place / name))


def _is_locked(path: Path) -> bool:
    """Whether another process holds a lock on a file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno in HELD
    return False


def _is_abandoned(path: Path) -> bool:
    """Whether the process that was writing a file is dead; that of another host, if the file is old."""
    owner = OWNER.search(path.name)
    if owner is not None and owner["host"].endswith(f".{platform.node()}"):
        return not is_alive(int(owner["pid"]))
    try:
        return time.time() - path.stat().st_mtime > OLD_S
    except FileNotFoundError:
        return False

"""What the phases of a run took: `phases.jsonl`, a row for each time that a process worked on one."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from pydantic import TypeAdapter, ValidationError

from r3rag_jax.run.files import append_rows


@dataclasses.dataclass
class Work:
    """One time that a process works on a phase."""

    is_new: bool = True  # False: the phase was finished before
    seconds: float = 0.0  # that it took


@dataclasses.dataclass(frozen=True)
class PhaseCost:
    """What a phase took: a row of `phases.jsonl`, or several added up.

    Fields:
        seconds: on the clock; compilations, checkpoints and the time before an interruption are part of it.
        sampled: tokens that the engine sampled; a server's are not counted.
        devices: kind and number, e.g. `8 x NVIDIA H100`.
        device_bytes: the most that any device of process 0 has held from the start of the process to the end of the
            phase; None where devices do not say.
        host_bytes: the same of process 0 in the host's memory.
    """

    phase: str
    seconds: float
    sampled: int
    devices: str
    device_bytes: int | None
    host_bytes: int

    def __add__(self, later: PhaseCost) -> PhaseCost:
        known = [of for of in (self.device_bytes, later.device_bytes) if of is not None]
        return dataclasses.replace(
            later,
            seconds=self.seconds + later.seconds,
            sampled=self.sampled + later.sampled,
            device_bytes=max(known, default=None),
            host_bytes=max(self.host_bytes, later.host_bytes),
        )


_COST = TypeAdapter(PhaseCost)


@contextlib.contextmanager
def recorded(path: Path, phase: str, sampled: Callable[[], int]) -> Iterator[Work]:
    """Append to `path` what the block took, also where it raises; nothing of a phase that was finished before.

    Only process 0 writes. A process that is killed with SIGKILL leaves no row.

    Args:
        path: `phases.jsonl`.
        phase: its name.
        sampled: tells how many tokens were sampled so far.
    """
    work, started, before = Work(), time.monotonic(), sampled()

    def record() -> None:
        work.seconds = time.monotonic() - started
        if work.is_new and jax.process_index() == 0:
            cost = PhaseCost(phase, work.seconds, sampled() - before, _devices(), _device_bytes(), _host_bytes())
            append_rows(path, [dataclasses.asdict(cost)])

    try:
        yield work
    except BaseException:
        with contextlib.suppress(OSError):  # e.g. a full disk: what has ended the phase is what is reported
            record()
        raise
    record()


def phase_costs(rows: Iterable[dict[str, Any]]) -> dict[str, PhaseCost]:
    """What each phase took in all, by name, in the order of the rows of `phases.jsonl`; other rows are left out."""
    costs: dict[str, PhaseCost] = {}
    for row in rows:
        try:
            cost = _COST.validate_python(row)
        except ValidationError:
            continue
        costs[cost.phase] = costs[cost.phase] + cost if cost.phase in costs else cost
    return costs


def _devices() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _device_bytes() -> int | None:
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def _host_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

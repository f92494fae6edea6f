"""The watchdog: when nothing moves for a while, it says where every thread of the process stands.

A run that hangs (a device program that waits for another process, a server that never replies, a lock) is silent, and
on a machine that was lent for the night nobody can attach a debugger. What works calls `moved` now and then; the
watchdog, a thread, reports once for each stall.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

import jax

from r3rag_jax.run.files import write_text


@dataclasses.dataclass
class _Movement:
    """The last movement of this process."""

    where: str = "start"
    time_s: float = 0.0  # time.monotonic()


_last = _Movement()


def moved(where: str) -> None:
    """Note that the process has got somewhere; cheap enough for every decode call, search and update.

    Args:
        where: what begins now or has just been done, e.g. "rl iteration 3: update".
    """
    global _last
    _last = _Movement(where, time.monotonic())


class Watchdog:
    """A context manager that watches the calls of `moved` while its block runs.

    A stall is reported on stderr and in `<directory>/<time>-process-<k>.txt`, once: when there was movement again,
    the next one is a new one. Waiting for a process that is busy (it builds an index) looks like a stall, too.
    """

    def __init__(self, limit_s: float, directory: Path):
        """`limit_s`: how long nothing may move, in seconds; 0: the watchdog is off."""
        self._limit_s, self._directory = limit_s, directory
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        moved("start")
        if self._limit_s > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._limit_s > 0:
            self._thread.join()

    def _watch(self) -> None:
        reported: _Movement | None = None
        while not self._stop.wait(min(10.0, self._limit_s / 4)):
            last = _last
            stalled_s = time.monotonic() - last.time_s
            if stalled_s >= self._limit_s and last is not reported:
                reported = last
                self._report(last, stalled_s)

    def _report(self, last: _Movement, stalled_s: float) -> None:
        process = jax.process_index()
        text = (
            f"watchdog: nothing has moved for {stalled_s:.0f} s in process {process} since {last.where!r} "
            f"(log.watchdog_s={self._limit_s:g}); its threads stand here:\n\n{all_stacks()}"
        )
        print(text, file=sys.stderr, flush=True)
        path = self._directory / f"{time.strftime('%Y%m%d-%H%M%S')}-process-{process}.txt"
        try:
            write_text(path, text)
        except OSError as error:  # it may be the file system that hangs or is full
            print(f"watchdog: {path} cannot be written: {error}", file=sys.stderr, flush=True)


def all_stacks() -> str:
    """Where every Python thread of this process stands, the most recent call last; the calling thread is left out."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames.items()
        if ident != threading.get_ident()
    )

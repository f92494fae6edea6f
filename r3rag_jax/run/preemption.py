"""SIGTERM, Ctrl-C and notices of a preemption: how a run ends early and loses nothing.

    running ──signal──► asked ──end of the step, checkpoint──► StopRun, exit status 75 (SIGTERM) or 130 (Ctrl-C)
                          ├────a second signal───────────────► exit at once
                          └────`stop_s` seconds pass─────────► exit at once

Two kinds of work answer differently. A loop that saves (`StopSignals.deferred`) goes on to the end of its step; its
`SaveSchedule` then saves and raises StopRun. Everything else (an index, loading, an evaluation) has nothing to save
that is not in a file already: StopRun is raised where the main thread is, as Ctrl-C is in any Python program.

With several processes a signal to one of them stops all. In a loop that saves, process 0 says after which step
(`StopSignals.agreed`), so that all write the same checkpoint; elsewhere every process stops for itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from r3rag_jax.errors import INTERRUPTED_STATUS, TERMINATED_STATUS, StopRun
from r3rag_jax.parallel.processes import broadcast_json, post, posted

SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
PREEMPTION = "a preemption notice"
NOTE = "stop"  # name of the note by which a process tells the others
_asked = threading.Event()  # somebody has asked this process to stop, while a StopSignals listens
POLL_S = 1.0  # how often a process looks for the notes of others, and at the clock


def is_asked_to_stop() -> bool:
    """Whether this process is about to end: what waits for others need not go on waiting. Any thread may call."""
    return _asked.is_set()


def exit_status(why: str) -> int:
    """130 for Ctrl-C, which a person wants to be the end; 75 for all else: start the same command again."""
    return INTERRUPTED_STATUS if why.startswith(SIGNALS[signal.SIGINT]) else TERMINATED_STATUS


class Action(enum.Enum):
    """What a signal, a note of another process or the clock makes a process do."""

    NOTHING = "nothing"
    DEFER = "go on to the end of the step"
    RAISE = "raise StopRun in the main thread"
    EXIT = "end at once"


@dataclasses.dataclass
class StopState:
    """The state machine, without signals and clocks of its own.

    Fields:
        limit_s: seconds from the first request to the end, at most.
        is_deferred: whether a loop is running that stops at the end of its step.
        why: who has asked first, e.g. "SIGTERM"; None while nobody has.
        deadline: time of the clock at which the process ends, whatever it is doing.
        has_signal: whether a signal has come to this very process. Launchers send one to every process, and not at the
            same moment: a first signal after another process's note is no second one.
    """

    limit_s: float
    is_deferred: bool = False
    why: str | None = None
    deadline: float = float("inf")
    has_signal: bool = False

    def on_signal(self, why: str, now: float) -> Action:
        """A signal has come to this process; the second one ends it."""
        if self.has_signal:
            return Action.EXIT
        self.has_signal = True
        return self.on_note(why, now)

    def on_note(self, why: str, now: float) -> Action:
        """Another process has been asked to stop, or a preemption was announced; only the first one counts."""
        if self.why is not None:
            return Action.NOTHING
        self.why, self.deadline = why, now + self.limit_s
        return Action.DEFER if self.is_deferred else Action.RAISE

    def on_clock(self, now: float) -> Action:
        """Time has passed."""
        return Action.EXIT if now >= self.deadline else Action.NOTHING


class StopSignals:
    """Listens for signals while a `with` block runs. Without the block, nothing is ever asked to stop."""

    def __init__(self, limit_s: float = 300.0, say: Callable[[str], object] = lambda text: None):
        """Args: `limit_s`, the most seconds from the first signal to the end; `say` shows a sentence to the user."""
        self._state, self._say = StopState(limit_s), say
        self._lock = threading.Lock()
        self._wants_raise = threading.Event()
        self._is_listening = False
        self._is_stopping = False  # StopRun was made: a second one must not be raised while the first goes up
        self._restore: Callable[[], None] = lambda: None

    @property
    def why(self) -> str | None:
        """Who has asked this process to stop; None while nobody has."""
        return self._state.why

    def __enter__(self) -> Self:
        """Take over SIGTERM and Ctrl-C. Outside of the main thread Python has no signals: they stay as they were."""
        if threading.current_thread() is not threading.main_thread():
            return self
        # The interpreter writes each signal's number to a socket at once, even while the main thread is in a program
        # of XLA; a handler in Python would have to wait for the end of that.
        self._reader, writer = socket.socketpair()
        writer.setblocking(False)
        old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        old = {number: signal.signal(number, self._in_main_thread) for number in (*SIGNALS, signal.SIGUSR2)}
        self._is_listening = True
        thread = threading.Thread(target=self._listen, name="stop signals", daemon=True)
        thread.start()

        def restore() -> None:
            self._is_listening = False
            writer.send(b"\0")  # wakes the thread
            thread.join()
            signal.set_wakeup_fd(old_fd)
            for number, handler in old.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
            self._reader.close()
            writer.close()

        self._restore = restore
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        self._restore()
        self._restore = lambda: None
        _asked.clear()
        if self.why is not None and isinstance(error, Exception) and jax.process_count() > 1:
            # What another process leaves behind when it stops in the middle: a connection that was closed.
            raise self.stop_run(f"{type(error).__name__} while all processes were stopping") from error

    # ---- for loops that save

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While the block runs, whoever asks to stop waits for `agreed` to be asked, or for the end of the block.

        Raises:
            StopRun: the block has ended and somebody had asked.
        """
        self._state.is_deferred = True
        try:
            yield
        finally:
            self._state.is_deferred = False
        if self.why is not None:
            raise self.stop_run("the phase is finished")

    def agreed(self, step: int, save: bool) -> tuple[bool, str | None]:
        """What process 0 decides at the end of a step. All processes must call.

        Args:
            step: steps done in the phase.
            save: whether process 0 wants a checkpoint; of the others it is ignored.

        Returns:
            Whether to save; and why to stop after this step, None to go on.
        """
        why = self.why
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step) and why is None:
                why = PREEMPTION
            save, why = broadcast_json([save, why], "end of a step")
        if why is not None:
            self._on(self._state.on_note, why)
        return save, why

    def stop_run(self, what: str) -> StopRun:
        """The exception that ends the run, to be raised; `what` says what is kept."""
        self._is_stopping = True
        return StopRun(f"{self.why}: {what}; the same command goes on", exit_status(self.why or ""))

    # ---- the thread that listens

    def _listen(self) -> None:
        while self._is_listening:
            ready, _, _ = select.select([self._reader], [], [], POLL_S)
            for number in self._reader.recv(64) if ready else b"":
                if number in SIGNALS:
                    self._on_signal(SIGNALS[signal.Signals(number)])
            self._look_for_notes()
            if not ready and self._wants_raise.is_set() and not self._is_stopping:
                self._interrupt()  # again: the one before may have come just ahead of the wait that it was to end
            if self._state.on_clock(time.monotonic()) is Action.EXIT:
                self._exit(f"not done {self._state.limit_s:g} s after {self.why} (stop_s)")

    def _look_for_notes(self) -> None:
        try:
            notes = {} if self.why is not None else posted(NOTE)
        except jax.errors.JaxRuntimeError:
            return  # process 0 is gone, which JAX itself makes the end of this process
        for process, why in sorted(notes.items())[:1]:
            self._on(self._state.on_note, f"{why} to process {process}")

    def _on_signal(self, why: str) -> None:
        is_first = self.why is None
        self._on(self._state.on_signal, why)
        if is_first:
            post(NOTE, why)

    def _on(self, event: Callable[[str, float], Action], why: str) -> None:
        with self._lock:
            action = event(why, time.monotonic())
        if action is not Action.NOTHING and self._is_listening:
            _asked.set()
        if action is Action.EXIT:
            self._exit(f"a second {why}")
        elif action is Action.DEFER:
            self._say(
                f"{why}: the step under way is finished and saved, for at most {self._state.limit_s:g} s; "
                "a second signal ends at once"
            )
        elif action is Action.RAISE:
            self._wants_raise.set()
            self._interrupt()

    def _interrupt(self) -> None:
        """Have the main thread run `_in_main_thread`, also if it waits for a lock."""
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        """Python's handler; the thread that listens has decided, or is about to."""
        if number == signal.SIGUSR2 and self._wants_raise.is_set() and not self._is_stopping:
            raise self.stop_run("nothing was being trained; finished files are kept")

    def _exit(self, why: str) -> None:
        print(f"stopped at once: {why}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(exit_status(self.why or ""))

"""When a training loop saves, and when it stops."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import jax

from r3rag_jax.errors import ServiceError
from r3rag_jax.run.checkpoints import Checkpoints
from r3rag_jax.run.preemption import StopSignals


class SaveSchedule:
    """Saves after every so many steps and minutes, and before the run stops. Process 0 decides for all."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        stop: StopSignals,
        *,
        every: int,
        minutes: float,
        total: int,
        unit: str,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            every: steps between checkpoints.
            minutes: minutes between checkpoints; 0: steps alone decide.
            total: steps of the phase; after the last one a checkpoint is only written if the run stops.
            unit: what a step is called, e.g. "RL iteration".
            clock: seconds.
        """
        self._checkpoints, self._stop, self._clock = checkpoints, stop, clock
        self._every, self._minutes, self._total, self._unit = every, minutes, total, unit
        self._saved_at = clock()

    def after(self, step: int, save: Callable[[], None]) -> None:
        """Call `save` if a checkpoint is due. All processes must call, at the end of every step.

        Args:
            step: steps done in the phase.

        Raises:
            StopRun: the run has been asked to stop; its checkpoint is on disk.
        """
        due = step % self._every == 0 or (self._minutes > 0 and self._clock() - self._saved_at >= 60 * self._minutes)
        due, why = self._stop.agreed(step, due and step < self._total)
        if due or why is not None:
            save()
            self._saved_at = self._clock()
        if why is not None:
            self._checkpoints.wait()
            raise self._stop.stop_run(self._done(step))

    @contextlib.contextmanager
    def saved_from_services(self, step: Callable[[], int], save: Callable[[], None]) -> Iterator[None]:
        """Where a server that the block needs stays away, save what is done before the error goes up.

        With several processes nothing is saved where one of them alone has failed: the others would not come.

        Args:
            step: the steps that are done in the phase, asked when the block has failed.

        Raises:
            ServiceError: that of the block, with what is kept.
            StopRun: in its place where the run has been asked to stop, which ends the waiting for servers.
        """
        try:
            yield
        except ServiceError as error:
            if jax.process_count() > 1 and not error.is_common:
                raise
            if step() > (self._checkpoints.latest or 0):
                save()
            self._checkpoints.wait()
            if self._stop.why is not None:
                raise self._stop.stop_run(self._done(step())) from error
            text = f"{error}; {self._done(step())}; start the same command again when it answers"
            raise type(error)(text, is_common=error.is_common) from error

    def _done(self, step: int) -> str:
        newest = self._checkpoints.latest
        kept = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is of {newest}"
        return f"{self._unit} {step} of {self._total} is done, {kept}"

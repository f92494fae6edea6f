"""When a training loop saves, and when it stops."""

from __future__ import annotations

import time
from collections.abc import Callable

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
            raise self._stop.stop_run(
                f"{self._unit} {step} of {self._total} is done, the newest checkpoint is of {self._checkpoints.latest}"
            )

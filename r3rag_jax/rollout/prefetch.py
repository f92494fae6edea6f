"""Asynchronous rollouts: an iteration's rollouts run in a thread during the update of the iteration before.

Such rollouts come from the policy before that update, so training is one step off-policy; the importance ratios of the
policy loss correct for it, since they are relative to the log-probabilities recorded while sampling.

This is for one process alone. Processes that share a program must launch it in the same order, and two threads launch
in another order on each. Devices of their own do not help where the runtime orders all programs with collectives of a
process by their launch, as XLA's does on CPUs: process 0 waits with an update for process 1, which has decoded first.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Params = TypeVar("Params")
Policy = TypeVar("Policy")
Rollouts = TypeVar("Rollouts")


class Prefetcher(Generic[Params, Policy, Rollouts]):
    """Runs the rollouts of iterations, on demand or in a thread while the caller does something else."""

    def __init__(self, copy_policy: Callable[[Params], Policy], run: Callable[[int, Policy], Rollouts]):
        """Create the thread.

        Args:
            copy_policy: makes the copy of the parameters that rollouts sample with; called in the caller's thread, so
                that the parameters may be donated to the update as soon as `start` returns.
            run: runs the rollouts of an iteration with such a policy; never called twice at the same time.
        """
        self._copy_policy, self._run = copy_policy, run
        self._thread = ThreadPoolExecutor(1)
        self._started: tuple[int, Future[Rollouts]] | None = None

    def start(self, iteration: int, params: Params) -> None:
        """Begin the rollouts of an iteration in the thread."""
        self._started = iteration, self._thread.submit(self._run, iteration, self._copy_policy(params))

    def has_started(self, iteration: int) -> bool:
        """Whether the rollouts of an iteration were started, with the policy of that time."""
        return self._started is not None and self._started[0] == iteration

    def result(self, iteration: int, params: Params) -> Rollouts:
        """Return the rollouts started for the iteration, or else run them here with the policy of `params`."""
        if self._started is not None and self.has_started(iteration):
            rollouts, self._started = self._started[1].result(), None
            return rollouts
        self.discard()
        return self._run(iteration, self._copy_policy(params))

    def discard(self) -> None:
        """Wait for the rollouts that were started and drop them, e.g. because their policy was rolled back."""
        if self._started is not None:
            self._started[1].result()
        self._started = None

    def __enter__(self) -> Prefetcher[Params, Policy, Rollouts]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown()

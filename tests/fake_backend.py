"""A rollout backend whose completions are dictated; the rest of a rollout is real."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from r3rag_jax.rollout.env import StopRule
from r3rag_jax.types import Completion, Context

Complete = Callable[[int, Context], Sequence[int]]  # slot, context -> sampled ids
LogprobsOf = Callable[[Sequence[int]], Sequence[float] | None]  # sampled ids -> log-probabilities


class FakeBackend:
    """Completes contexts by a function, by default with log-probability -0.5 each; a call finishes all under way."""

    is_open = True

    def __init__(self, complete: Complete, num_slots: int = 2, logprobs_of: LogprobsOf | None = None):
        """`logprobs_of`: log-probabilities of the ids of a completion; None: they are unknown."""
        self._complete, self.num_slots = complete, num_slots
        self._logprobs_of = logprobs_of or (lambda ids: [-0.5] * len(ids))
        self._active: dict[int, Context] = {}
        self.contexts: list[Context] = []  # in the order in which they came
        self.stops: list[StopRule] = []  # of each rollout
        self.num_calls = 0

    @contextlib.contextmanager
    def generate(self, stops: StopRule) -> Iterator[FakeBackend]:
        self.stops.append(stops)
        self._active = {}
        yield self

    @property
    def num_active(self) -> int:
        return len(self._active)

    def submit(self, contexts: Mapping[int, Context]) -> None:
        assert not self._active.keys() & contexts.keys() and all(0 <= slot < self.num_slots for slot in contexts)
        self._active |= contexts
        self.contexts += contexts.values()

    def wait(self) -> list[tuple[int, Completion]]:
        active, self._active = self._active, {}
        self.num_calls += bool(active)
        completions = []
        for slot, context in sorted(active.items()):
            ids = list(self._complete(slot, context))[: context.budget]
            logprobs = self._logprobs_of(ids)
            known = None if logprobs is None else np.asarray(logprobs, np.float32)
            completions.append((slot, Completion(ids, known)))
        return completions


def scripted(scripts: Sequence[Sequence[Sequence[int]]]) -> Complete:
    """Write the next ids of a slot's script, and begin the next script where that has come to its end."""
    waiting, slots = list(scripts), dict[int, Iterator[Sequence[int]]]()

    def complete(slot: int, context: Context) -> Sequence[int]:
        ids = next(slots.get(slot, iter(())), None)
        if ids is None:
            slots[slot] = iter(waiting.pop(0))
            ids = next(slots[slot])
        return ids

    return complete

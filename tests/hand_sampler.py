"""A sampler of the live scheduler that writes when a test does, what the test dictates."""

from __future__ import annotations

import queue

from r3rag_jax.rollout.live_sampling import Draft, Tell
from r3rag_jax.types import Completion

WAIT_S = 30


class Hand:
    """Its drafts wait in a queue until the test tells what is written of them."""

    has_work = False

    def __init__(self, num_slots: int = 1):
        self.num_slots = num_slots
        self.drafts: queue.Queue[Draft] = queue.Queue()
        self.cancelled: queue.Queue[Draft] = queue.Queue()
        self.is_closed = False

    def start(self, tell: Tell) -> None:
        self.tell = tell

    def begin(self, draft: Draft) -> None:
        self.drafts.put(draft)

    def cancel(self, draft: Draft) -> None:
        self.cancelled.put(draft)

    def work(self) -> None:
        raise AssertionError

    def close(self) -> None:
        self.is_closed = True

    def next(self) -> Draft:
        """The oldest draft that has not been taken."""
        return self.drafts.get(timeout=WAIT_S)

    def write(self) -> Draft:
        """Finish the oldest draft with tokens that mean nothing."""
        draft = self.next()
        self.tell(draft, Completion([1, 2], None))
        return draft

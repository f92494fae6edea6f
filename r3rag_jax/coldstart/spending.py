"""What a teacher may be asked in a minute, and what it costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from r3rag_jax.coldstart.journal import Journal, Reply
from r3rag_jax.config import TeacherConfig

CHARS_PER_TOKEN = 4  # of an estimate, before the server has counted


class TokenLimit:
    """Spaces requests so that at most `per_minute` tokens are used in a minute, whichever thread uses them.

    A request reserves what it may use at most; what it did not use is given back.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._gap_s, self._clock = 60 / per_minute, clock
        self._lock = threading.Lock()
        self._next = clock()

    def reserve(self, tokens: int) -> float:
        """Reserve so many tokens; returns the seconds until the request may be made."""
        with self._lock:
            now = self._clock()
            start = max(now, self._next)
            self._next = start + tokens * self._gap_s
            return start - now

    def give_back(self, tokens: int) -> None:
        """A request has used so many tokens less than it had reserved; negative: more."""
        with self._lock:
            self._next -= tokens * self._gap_s


def most_tokens(prompt: str, max_tokens: int) -> int:
    """What a request may use at most, by an estimate of its prompt; servers count likewise when they limit a rate."""
    return len(prompt) // CHARS_PER_TOKEN + max_tokens


def used_tokens(reply: Reply, prompt: str) -> int:
    """What a request has used, as the server counts or, where it does not say, by an estimate."""
    if reply.input_tokens is not None and reply.output_tokens is not None:
        return reply.input_tokens + reply.output_tokens
    return (len(prompt) + len(reply.text)) // CHARS_PER_TOKEN


def cost(journal: Journal, config: TeacherConfig) -> float:
    """What all replies of a journal have cost, those of earlier runs too. Replies without counts cost nothing here."""
    return (journal.input_tokens * config.price_input + journal.output_tokens * config.price_output) / 1e6

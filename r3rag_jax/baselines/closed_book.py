"""Closed book: the model answers from its weights, without a retrieval."""

from __future__ import annotations

from collections.abc import Sequence

from r3rag_jax.baselines.reading import LineReader
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.rollout.env import Done
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.types import Completion, Context


class ClosedBookEnv:
    """One question, answered in one line."""

    def __init__(self, request: RolloutRequest, reader: LineReader):
        self._request, self._reader = request, reader

    def start(self) -> Context:
        """See `Env.start`."""
        return self._reader.context(self._request, ())

    def step(self, completion: Completion) -> Done:
        """See `Env.step`."""
        return self._reader.done(self._request, (), completion)

    def observe(self, hits: Sequence[Hit]) -> Done:
        """Not called: closed book never searches."""
        raise AssertionError("closed book never searches")

"""Naive RAG: one retrieval for the question itself, then one line of answer.

R3-RAG (arXiv 2505.23794) retrieves 16 passages for it. A prompt that exceeds the context loses its last passages.
"""

from __future__ import annotations

from collections.abc import Sequence

from r3rag_jax.baselines.reading import LineReader
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.rollout.env import Done, Search
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.types import Completion, Context, Passage


class NaiveRAGEnv:
    """One question, answered in one line that may use what one search found."""

    def __init__(self, request: RolloutRequest, reader: LineReader, top_k: int):
        """`top_k`: most passages in the prompt."""
        self._request, self._reader, self._top_k = request, reader, top_k
        self._passages: tuple[Passage, ...] = ()

    def start(self) -> Search:
        """See `Env.start`."""
        return Search(self._request.question.question, self._top_k)

    def observe(self, hits: Sequence[Hit]) -> Context:
        """See `Env.observe`."""
        self._passages = tuple(hit.passage for hit in hits[: self._top_k])
        return self._reader.context(self._request, self._passages)

    def step(self, completion: Completion) -> Done:
        """See `Env.step`."""
        return self._reader.done(self._request, self._passages, completion)

"""RAG + CoT: one search with the question, then a chain of thought over what it found.

R3-RAG (arXiv 2505.23794) names it "RAG with CoT" and retrieves 16 passages. A prompt that exceeds the context loses its
last passages; a chain that ends without "So the answer is:" is continued by these words.
"""

from __future__ import annotations

from collections.abc import Sequence

from r3rag_jax.baselines.chain import WholeChainEnv
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.rollout.env import Done, Search
from r3rag_jax.types import Context


class RAGCoTEnv(WholeChainEnv):
    """One question, answered at the end of a chain of thought over what one search found."""

    def start(self) -> Search:
        """See `Env.start`."""
        return self._attempt.search(self._attempt.question, self._settings.top_k)

    def observe(self, hits: Sequence[Hit]) -> Context | Done:
        """See `Env.observe`."""
        self._passages = [hit.passage for hit in hits[: self._settings.top_k]]
        self._attempt.observe(self._passages)
        return self._context()

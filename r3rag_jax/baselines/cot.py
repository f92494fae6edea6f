"""CoT (Wei et al., arXiv 2201.11903): a chain of thought from the model's weights, without a retrieval.

The paper decodes greedily. A chain that its budget cuts off, or that ends without "So the answer is:", is continued by
these words.
"""

from __future__ import annotations

from collections.abc import Sequence

from r3rag_jax.baselines.chain import WholeChainEnv
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.rollout.env import Done
from r3rag_jax.types import Context


class CoTEnv(WholeChainEnv):
    """One question, answered at the end of a chain of thought."""

    def start(self) -> Context | Done:
        """See `Env.start`."""
        return self._context()

    def observe(self, hits: Sequence[Hit]) -> Done:
        """Not called: CoT never searches."""
        raise AssertionError("CoT never searches")

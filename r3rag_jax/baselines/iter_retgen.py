"""ITER-RETGEN (Shao et al., arXiv 2305.15294): a whole chain of thought is the next query.

The first search is for the question. Then, `iterations` times, the model writes a whole chain of thought over the
passages of the last search, and each chain but the last is searched for, after the question. Passages of earlier
searches are not shown again. The answer is that of the last chain.

Three iterations are FlashRAG's constant; the paper reports one to seven, with five passages each.
"""

from __future__ import annotations

from r3rag_jax.baselines.chain import ChainSettings
from r3rag_jax.baselines.rag_cot import RAGCoTEnv
from r3rag_jax.rollout.env import Transition
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.types import Completion


class IterRetGenEnv(RAGCoTEnv):
    """One question, whose chain of thought is written again over what it finds as a query."""

    def __init__(self, request: RolloutRequest, settings: ChainSettings, *, iterations: int):
        """`iterations`: number of searches, and of chains."""
        super().__init__(request, settings)
        self._num_left = iterations

    def step(self, completion: Completion) -> Transition:
        """See `Env.step`."""
        if self._is_answering or self._num_left == 1:
            return super().step(completion)
        self._num_left -= 1
        chain = self._attempt.read(completion).strip()
        return self._attempt.search(f"{self._attempt.question} {chain}".strip(), self._settings.top_k, chain)

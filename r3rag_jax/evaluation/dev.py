"""The dev questions during RL."""

from __future__ import annotations

from collections.abc import Sequence

from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.rewards.answer import answer_metrics
from r3rag_jax.rollout.backends import RolloutBackend
from r3rag_jax.rollout.env import EnvFactory
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.types import Question


class DevEvaluation:
    """Measures a policy on the dev questions, greedily."""

    def __init__(
        self, questions: Sequence[Question], env_factory: EnvFactory, retriever: Retriever, *, search_overlap: int
    ):
        self._questions, self._env_factory, self._retriever = questions, env_factory, retriever
        self._search_overlap = search_overlap

    def __call__(self, backend: RolloutBackend) -> dict[str, float]:
        """The metric `dev_em`, a share."""
        requests = [RolloutRequest(question) for question in self._questions]
        trajectories = rollout(
            backend, self._env_factory, self._retriever, requests, search_overlap=self._search_overlap
        )
        return {"dev_em": float(answer_metrics(trajectories)["em"].mean())}

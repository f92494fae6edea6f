"""What is to be rolled out: a question, and what its sampling depends on."""

from __future__ import annotations

import dataclasses

import numpy as np

from r3rag_jax.types import Question


@dataclasses.dataclass(frozen=True)
class RolloutRequest:
    """One trajectory to sample. Its randomness depends on (seed, sample_index, question id), not on its slot."""

    question: Question
    sample_index: int = 0  # which of the question's trajectories this is
    temperature: float = 0.0  # 0 = greedy
    seed: int = 0

    def key(self, step: int) -> np.ndarray:
        """Return the PRNG key, uint32 [2], with which step number `step` (from 0) is sampled."""
        entropy = [self.seed, self.sample_index, step, *self.question.id.encode()]
        return np.random.SeedSequence(entropy).generate_state(2)

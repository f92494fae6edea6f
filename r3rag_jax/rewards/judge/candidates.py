"""Candidate EM: does a model that reads off the answers which a text offers find one that is an exact match?

The released code of R3-RAG counts so under the name of exact match. An answer that hedges is right by it; it is
therefore a metric of evaluations under a name of its own, and never a reward.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r3rag_jax.rewards.judge.correctness import unmatched_answers
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.types import Trajectory


def candidate_em(trajectories: Sequence[Trajectory], judge: Judge, em_B: np.ndarray) -> np.ndarray:
    """float32 [B]: 1 for an exact match, else whether a candidate is one; 0 without an answer, NaN = the judge failed.

    Args:
        em_B: float32 [B], exact match.

    Raises:
        UserError: the judge fails too often.
    """
    rows = unmatched_answers(trajectories, em_B)
    verdicts = judge.ask([judge.candidates(trajectories[i].question, trajectories[i].answer or "") for i in rows])
    found_B = np.asarray(em_B, np.float32).copy()
    found_B[rows] = verdicts.values
    return found_B

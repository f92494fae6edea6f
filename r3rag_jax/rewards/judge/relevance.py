"""Process reward `judge`: how relevant the passages of each step are, as a language model judges (the paper's Rel).

A search that repeats an earlier query of its trajectory, or shows no passage that the earlier steps had not shown
(`novelty.py`), earns 0, and nobody is asked about it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r3rag_jax.rewards.base import Resources, required
from r3rag_jax.rewards.judge.prompts import Inquiry
from r3rag_jax.rewards.novelty import new_searches
from r3rag_jax.types import Trajectory


def inquiries(trajectories: Sequence[Trajectory], resources: Resources) -> list[Inquiry]:
    """One for each search that brings something new."""
    judge = required(resources.judge, "a judge")
    return [
        judge.relevance(trajectories[i].question, trajectories[i].steps[k]) for i, k, _ in new_searches(trajectories)
    ]


def relevance_rewards(trajectories: Sequence[Trajectory], resources: Resources) -> np.ndarray:
    """float32 [B, K], the verdicts on searches that bring something new, in [0, 1]; 0 for other steps, NaN = failed.

    Raises:
        ValueError: there are no verdicts.
    """
    process_BK = np.zeros((len(trajectories), resources.max_steps), np.float32)
    verdicts_N = required(resources.verdicts_N, "the judge's verdicts")
    for (i, k, _), verdict in zip(new_searches(trajectories), verdicts_N, strict=True):
        process_BK[i, k] = verdict
    return process_BK

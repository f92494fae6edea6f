"""Process reward `judge`: how relevant the passages of each step are, as a language model judges (the paper's Rel)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from r3rag_jax.rewards.base import Resources, required
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.rewards.judge.prompts import Inquiry
from r3rag_jax.types import Trajectory


def inquiries(trajectories: Sequence[Trajectory], judge: Judge) -> list[Inquiry]:
    """One for each step that retrieved passages."""
    return [judge.relevance(trajectories[i].question, trajectories[i].steps[k]) for i, k in _searches(trajectories)]


def relevance_rewards(trajectories: Sequence[Trajectory], resources: Resources) -> np.ndarray:
    """float32 [B, K], the verdicts on the steps that retrieved passages, in [0, 1]; 0 for other steps, NaN = failed.

    Raises:
        ValueError: there are no verdicts.
    """
    process_BK = np.zeros((len(trajectories), resources.max_steps), np.float32)
    verdicts_N = required(resources.verdicts_N, "the judge's verdicts")
    for (i, k), verdict in zip(_searches(trajectories), verdicts_N, strict=True):
        process_BK[i, k] = verdict
    return process_BK


def _searches(trajectories: Sequence[Trajectory]) -> Iterator[tuple[int, int]]:
    """Indices (trajectory, step) of the steps that retrieved passages: without any there is nothing to judge."""
    for i, trajectory in enumerate(trajectories):
        yield from ((i, k) for k, step in enumerate(trajectory.steps) if step.passages)

"""Outcome reward `judge`: an answer is correct if it is an exact match or a model says so (the paper's Acc)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r3rag_jax.rewards.answer import em_rewards
from r3rag_jax.rewards.base import Resources, required
from r3rag_jax.rewards.judge.prompts import Inquiry
from r3rag_jax.types import Trajectory


def inquiries(trajectories: Sequence[Trajectory], resources: Resources) -> list[Inquiry]:
    """One for each answer that is no exact match."""
    judge = required(resources.judge, "a judge")
    unmatched = unmatched_answers(trajectories, em_rewards(trajectories, resources))
    return [judge.correctness(trajectories[i].question, trajectories[i].answer or "") for i in unmatched]


def correctness_rewards(trajectories: Sequence[Trajectory], resources: Resources) -> np.ndarray:
    """float32 [B]: 1 for an exact match, else the verdict on the answer; 0 without an answer, NaN = failed.

    Raises:
        ValueError: there are no verdicts.
    """
    correct_B = em_rewards(trajectories, resources).copy()
    correct_B[unmatched_answers(trajectories, correct_B)] = required(resources.verdicts_N, "the judge's verdicts")
    return correct_B


def unmatched_answers(trajectories: Sequence[Trajectory], em_B: np.ndarray) -> list[int]:
    """Indices of the trajectories with an answer that is no exact match."""
    return [i for i, trajectory in enumerate(trajectories) if trajectory.answer is not None and em_B[i] < 1]

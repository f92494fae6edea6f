"""The samples of one question as a group: its number, and whether its rewards differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r3rag_jax.types import Trajectory

EQUAL = 1e-6  # rewards that differ by less are equal: the rest is rounding


def number_groups(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """The number of each trajectory's question, counted in order of first appearance, int [N]."""
    numbers = {id: number for number, id in enumerate(dict.fromkeys(t.question.id for t in trajectories))}
    return np.asarray([numbers[t.question.id] for t in trajectories], int)


def has_zero_variance(rewards: Sequence[np.ndarray], groups: np.ndarray, *, totals: bool) -> np.ndarray:
    """Whether all trajectories of a trajectory's question earned the same, bool [N].

    Comparing such trajectories teaches nothing, and whitening would inflate their rounding errors: DAPO leaves them out
    and samples other questions instead (dynamic sampling, arXiv 2503.14476; `rl.max_resamples`).

    Args:
        rewards: for each trajectory the rewards [K] of its steps.
        groups: int [N], numbers of the questions.
        totals: compare the sums of the rewards instead of every step's.
    """
    table = np.zeros((len(rewards), max(map(len, rewards), default=0)), np.float32)
    for row, rewards_K in enumerate(rewards):
        table[row, : len(rewards_K)] = rewards_K
    table = table.sum(axis=1, keepdims=True) if totals else table
    return np.asarray([np.ptp(table[groups == group], axis=0).max(initial=0) <= EQUAL for group in groups], bool)

"""Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13): long trajectories earn less, by 1 at the limit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def overlong_penalties(num_tokens: Sequence[int] | np.ndarray, *, limit: int, share: float) -> np.ndarray:
    """What is added to the rewards of trajectories with so many sampled tokens, float32 [N] in [-1, 0].

    0 up to (1 - share) * limit, -1 from the limit on, linear in between.

    Args:
        num_tokens: int [N].
        limit: L_max, the tokens that a trajectory may sample.
        share: L_cache / L_max, in [0, 1]; 0: no penalty.
    """
    if share == 0:
        return np.zeros(len(num_tokens), np.float32)
    buffer = share * limit
    return np.clip((limit - buffer - np.asarray(num_tokens)) / buffer, -1.0, 0.0).astype(np.float32)


def add_to_last_step(rewards: Sequence[np.ndarray], penalties: np.ndarray) -> list[np.ndarray]:
    """The rewards [K] of the steps of N trajectories, each with its penalty added to its last step."""
    changed = [np.array(rewards_K, np.float32) for rewards_K in rewards]
    for rewards_K, penalty in zip(changed, penalties, strict=True):
        rewards_K[-1:] += penalty
    return changed

"""Groups of samples: those without a difference are found."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from r3rag_jax.training.groups import has_zero_variance, number_groups
from r3rag_jax.types import Question, Status, Trajectory

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


def test_groups_without_a_difference_are_found() -> None:
    rewards = [np.array(r, np.float32) for r in ([0.5, 2.0], [0.5, 2.0], [1.0], [0.5, 0.5], [1.0], [1.0, 0.0])]
    ids = ("easy", "easy", "hard", "hard", "short", "short")
    trajectories = [Trajectory(Question(id, "q", ("a",)), (), Status.ANSWERED) for id in ids]
    groups = number_groups(trajectories)
    assert groups.tolist() == [0, 0, 1, 1, 2, 2]
    assert has_zero_variance(rewards, groups, totals=False).tolist() == [True, True, False, False, True, True]
    assert has_zero_variance(rewards, groups, totals=True).tolist() == [True] * 6

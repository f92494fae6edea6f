"""Process reward `gold`: typed-out numbers."""

import jax.numpy as jnp
import numpy as np

from r3rag_jax.rewards.base import Resources
from r3rag_jax.rewards.gold import gold_rewards, num_new_gold
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory


def test_num_new_gold():
    retrieved_BKP = jnp.array(
        [
            [[7, 1], [1, 7], [3, 2], [2, 5]],  # new 1; nothing new; new 2; 2 again
            [[1, 2], [3, 4], [5, 6], [9, -1]],  # both golds at once, then none; padding is no gold
            [[5, -1], [8, -1], [-1, -1], [1, 1]],  # the last step was not taken
        ]
    )
    gold_BG = jnp.array([[1, 2], [1, 2], [1, -1]])
    step_mask_BK = jnp.array([[True] * 4, [True] * 4, [True, True, True, False]])
    np.testing.assert_array_equal(
        num_new_gold(retrieved_BKP, gold_BG, step_mask_BK),
        [[1, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0]],
    )
    assert num_new_gold(retrieved_BKP, gold_BG, step_mask_BK).dtype == jnp.float32


def test_gold_rewards_of_trajectories():
    a, b, c = (Passage(id, id) for id in "abc")
    question = Question("q", "?", ("x",), {"supporting_ids": ["a", "b", "a"]})
    steps = Step("", query="1", passages=(c, a)), Step("", query="2", passages=(a,)), Step("", query="3", passages=(b,))
    unsupported = Question("r", "?", ("x",))
    trajectories = [
        Trajectory(question, (*steps, Step("", answer="x")), Status.ANSWERED),
        Trajectory(question, steps[:1], Status.NO_ANSWER),
        Trajectory(unsupported, steps, Status.NO_ANSWER),
        Trajectory(question, (Step("", query="4", passages=(a, b, c)),), Status.NO_ANSWER),
    ]
    rewards = gold_rewards(trajectories, Resources(max_steps=5))
    np.testing.assert_array_equal(rewards, [[1, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [2, 0, 0, 0, 0]])
    assert rewards.dtype == np.float32

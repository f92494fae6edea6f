"""Process reward `gold`: how many supporting passages a step shows that no earlier step showed.

Shape suffixes: B trajectories, K steps, P passages of one step, G gold passages.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from r3rag_jax.rewards.base import Resources, next_power_of_two
from r3rag_jax.types import Trajectory


def gold_rewards(trajectories: Sequence[Trajectory], resources: Resources) -> np.ndarray:
    """`num_new_gold` of the trajectories, float32 [B, K]; 0 for questions without supporting ids."""
    num = len(trajectories)
    supporting_ids = [tuple(dict.fromkeys(trajectory.question.supporting_ids)) for trajectory in trajectories]
    shape_BK = next_power_of_two(num), resources.max_steps
    num_passages = max((len(step.passages) for t in trajectories for step in t.steps), default=1)
    step_mask_BK = np.zeros(shape_BK, bool)
    retrieved_BKP = np.full((*shape_BK, next_power_of_two(num_passages)), -1, np.int32)
    gold_BG = np.full((shape_BK[0], next_power_of_two(max(map(len, supporting_ids), default=1))), -1, np.int32)
    numbers: dict[str, int] = {}  # of passage ids, which are texts
    for row, trajectory in enumerate(trajectories):
        step_mask_BK[row, : len(trajectory.steps)] = True
        for k, step in enumerate(trajectory.steps):
            ids = [numbers.setdefault(passage.id, len(numbers)) for passage in step.passages]
            retrieved_BKP[row, k, : len(ids)] = ids
        gold = [numbers.setdefault(id, len(numbers)) for id in supporting_ids[row]]
        gold_BG[row, : len(gold)] = gold
    return np.asarray(num_new_gold(retrieved_BKP, gold_BG, step_mask_BK))[:num]


@jax.jit
def num_new_gold(retrieved_BKP: jax.Array, gold_BG: jax.Array, step_mask_BK: jax.Array) -> jax.Array:
    """For each step, the number of gold passages that it retrieved and no earlier step had.

    The numbers of a trajectory add up to the gold passages found, whether one search found them or several, and showing
    one again earns nothing.

    Args:
        retrieved_BKP: int [B, K, P], numbers of the retrieved passages, padded with a negative number.
        gold_BG: int [B, G], different numbers of the passages that support the answer, padded with a negative number.
        step_mask_BK: bool [B, K], True = the step was taken.

    Returns:
        float32 [B, K].
    """
    found_BKG = jnp.any(retrieved_BKP[:, :, :, None] == gold_BG[:, None, None, :], axis=2)
    found_BKG &= (gold_BG >= 0)[:, None, :] & step_mask_BK[:, :, None]
    # A gold passage is new where the running count of the steps that found it first becomes 1.
    new_BKG = found_BKG & (jnp.cumsum(found_BKG, axis=1) == 1)
    return jnp.sum(new_BKG, axis=2, dtype=jnp.float32)

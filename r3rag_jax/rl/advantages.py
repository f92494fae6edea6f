"""Advantage estimates: generalised advantage estimation on one row (T tokens), baselines, whitening."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def gae(
    rewards_T: jax.Array,
    values_T: jax.Array,
    continues_T: jax.Array,
    mask_T: jax.Array,
    *,
    gamma: float,
    lam: float,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation over the kept tokens of one row of one or more episodes.

        delta_t = r_t + gamma V_{t'} - V_t        A_t = delta_t + gamma lam A_{t'}

    (arXiv 1506.02438, eq. 16), where t' is the next *kept* token of the same episode: prompt,
    passage and padding tokens are stepped over, so discounting counts generated tokens only. After
    the last kept token of an episode V_{t'} = A_{t'} = 0 (a limit on steps ends an episode; nothing
    is bootstrapped).

        mask       1 1 0 0 1 | 0 1 1      0 = passage or prompt
        continues  1 1 1 1 0 | 1 1 0      one row, two episodes; nothing crosses the bar

    Args:
        rewards_T: float [T]; a reward on a token that is not kept is ignored.
        values_T: float [T], V of the state before each token; may hold anything where not kept.
        continues_T: bool [T], False on the last token of an episode, kept or not.
        mask_T: bool [T], True = keep (tokens the policy generated).
        gamma: discount per kept token.
        lam: weight of the longer returns, 0 = one-step TD, 1 = Monte Carlo.

    Returns:
        advantages_T and returns_T = advantages + values, float32 [T], 0 where not kept.
    """
    rewards_T = rewards_T.astype(jnp.float32)
    values_T = values_T.astype(jnp.float32)

    def backward(carry, token):
        reward, value, continues, keep = token
        next_value, next_advantage = jax.tree.map(lambda x: jnp.where(continues, x, 0.0), carry)
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(keep, value, next_value), jnp.where(keep, advantage, next_advantage)
        return carry, jnp.where(keep, advantage, 0.0)

    tokens = (rewards_T, values_T, continues_T.astype(bool), mask_T.astype(bool))
    zero = jnp.zeros((), jnp.float32)
    _, advantages_T = lax.scan(backward, (zero, zero), tokens, reverse=True)
    return advantages_T, jnp.where(mask_T, advantages_T + values_T, 0.0)


@functools.partial(jax.jit, static_argnames="num_groups")
def group_baseline(returns_BT: jax.Array, mask_BT: jax.Array, groups_B: jax.Array, num_groups: int) -> jax.Array:
    """What the *other* trajectories of each one's group earn from the same step on, on average.

    Leave-one-out (arXiv 2402.14740), step by step: it does not depend on what the trajectory itself does, so
    subtracting it from the return of a step leaves the policy gradient unbiased, and it takes out how hard the
    question is and how much of the reward is still to come. (One baseline for the whole trajectory would count
    against its last steps what the first ones have earned.)

    Args:
        returns_BT: float [B, T], from each step on. mask_BT: bool [B, T], the steps that a trajectory has.
        groups_B: int [B], its question, in [0, num_groups).

    Returns:
        float32 [B, T]; where no other of the group has the step, the mean of all others in the batch; 0 where no
        other has it, and where mask is False.
    """
    mask_BT = mask_BT.astype(jnp.float32)
    returns_BT = jnp.where(mask_BT > 0, returns_BT.astype(jnp.float32), 0.0)

    def mean_of_others(groups_B: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
        total = jax.ops.segment_sum(returns_BT, groups_B, num_groups)[groups_B] - returns_BT
        count = jax.ops.segment_sum(mask_BT, groups_B, num_groups)[groups_B] - mask_BT
        return total / jnp.maximum(count, 1), count

    of_group, count = mean_of_others(groups_B, num_groups)
    of_batch, _ = mean_of_others(jnp.zeros_like(groups_B), 1)
    return mask_BT * jnp.where(count > 0, of_group, of_batch)


def whiten(x: jax.Array, mask: jax.Array, *, std_floor: float = 1e-4) -> jax.Array:
    """Shift and scale the kept entries to mean 0 and standard deviation 1, over all axes at once.

    Args:
        x: float [...], any shape.
        mask: bool of the same shape, True = keep.
        std_floor: a smaller deviation counts as none, and all become 0: equal entries differ by rounding, which
            Adam would make whole steps of.

    Returns:
        float32 of the same shape, 0 where not kept; all 0 when nothing is kept or nothing differs.
    """
    x = x.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    centred = jnp.where(mask, x - jnp.sum(jnp.where(mask, x, 0.0)) / count, 0.0)
    std = jnp.sqrt(jnp.sum(jnp.square(centred)) / count)
    return jnp.where(std > std_floor, centred / jnp.maximum(std, std_floor), 0.0)

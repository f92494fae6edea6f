"""What advantages are made of: returns along a trajectory, baselines of a group, whitening.

Everything is a pure function of one trajectory, or of an iteration's table of them (`types.TrajectoryTable`).
Shape suffixes: N trajectories, T policy tokens of one, K its steps.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from r3rag_jax.types import TrajectoryTable

STD_FLOOR = 1e-4  # a smaller deviation counts as none: equal entries differ by rounding


def gae(
    rewards_T: jax.Array,
    values_T: jax.Array,
    discounts_T: jax.Array,
    mask_T: jax.Array,
    *,
    lam: float,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation over the kept tokens of one trajectory.

        delta_t = r_t + gamma_t V_{t'} - V_t        A_t = delta_t + gamma_t lam A_{t'}

    (arXiv 1506.02438, eq. 16, with a discount per token), where t' is the next *kept* token: other tokens are
    skipped. A discount of 0 ends an episode, and so does the last kept token (a trajectory that reaches the limit of
    steps ends there; nothing is bootstrapped). With values of 0 and lam = 1 the advantages are discounted returns.

    Args:
        rewards_T: float [T]; a reward on a token that is not kept is ignored.
        values_T: float [T], V of the state before each token; may hold anything where not kept.
        discounts_T: float [T], weight of what comes after the token; may hold anything where not kept.
        mask_T: bool [T], True = keep (tokens the policy generated).
        lam: lambda, 0 = one-step TD errors, 1 = Monte Carlo returns.

    Returns:
        advantages_T and returns_T = advantages + values, float32 [T], 0 where not kept.
    """
    rewards_T, values_T, discounts_T = (x.astype(jnp.float32) for x in (rewards_T, values_T, discounts_T))

    def backward(carry, token):
        reward, value, discount, keep = token
        next_value, next_advantage = carry
        advantage = reward + discount * next_value - value + discount * lam * next_advantage
        carry = jnp.where(keep, value, next_value), jnp.where(keep, advantage, next_advantage)
        return carry, jnp.where(keep, advantage, 0.0)

    zero = jnp.zeros((), jnp.float32)
    tokens = rewards_T, values_T, discounts_T, mask_T.astype(bool)
    _, advantages_T = lax.scan(backward, (zero, zero), tokens, reverse=True)
    return advantages_T, jnp.where(mask_T, advantages_T + values_T, 0.0)


def discounts(step_ids_T: jax.Array, mask_T: jax.Array, *, gamma: float, step_discount: float) -> jax.Array:
    """Weight of what comes after each token of one trajectory, whose kept tokens come first.

    gamma within a step, gamma * step_discount on its last token, 0 on the trajectory's last:

        step_ids         0     0        1     1        2   .
        step_discount d  gamma gamma*d  gamma gamma*d  0   0

    With step_discount 0 each step is an episode of its own, as in the released code of arXiv 2505.23794; with 1 credit
    flows across the whole trajectory; in general the return of step k is G_k = r_k + step_discount G_(k+1).

    Returns:
        float32 [T], 0 where not kept.
    """
    is_followed_T = jnp.append(mask_T[1:], False)
    is_same_T = jnp.append(step_ids_T[1:], -1) == step_ids_T
    return jnp.where(mask_T & is_followed_T, gamma * jnp.where(is_same_T, 1.0, step_discount), 0.0)


def ends(step_ids_T: jax.Array, mask_T: jax.Array) -> jax.Array:
    """bool [T], True on the last kept token of each step of one trajectory, whose kept tokens come first."""
    return mask_T & ~(jnp.append(mask_T[1:], False) & (jnp.append(step_ids_T[1:], -1) == step_ids_T))


def at_step_starts(x_T: jax.Array, step_ids_T: jax.Array, mask_T: jax.Array, num_steps: int) -> jax.Array:
    """[K]: x on the first kept token of each step of one trajectory, whose kept tokens come first; 0 without one."""
    is_first_T = mask_T & (jnp.append(-1, step_ids_T[:-1]) != step_ids_T)
    return jnp.zeros(num_steps, x_T.dtype).at[jnp.where(is_first_T, step_ids_T, num_steps)].set(x_T, mode="drop")


def token_shares(step_ids_NT: jax.Array, mask_NT: jax.Array, num_steps: int | None) -> jax.Array:
    """1 / number of kept tokens of a token's step, of which there are at most `num_steps`; None: of its trajectory.

    Returns:
        float32 [N, T], 0 where not kept.
    """
    if num_steps is None:
        step_ids_NT, num_steps = jnp.zeros_like(step_ids_NT), 1
    is_step_NTK = mask_NT[:, :, None] & (step_ids_NT[:, :, None] == jnp.arange(num_steps))
    counts_NK = jnp.sum(is_step_NTK, axis=1, dtype=jnp.float32)
    return jnp.where(mask_NT, 1.0 / jnp.maximum(jnp.take_along_axis(counts_NK, step_ids_NT, axis=1), 1.0), 0.0)


def leave_one_out(returns_NK: jax.Array, mask_NK: jax.Array, groups_N: jax.Array) -> jax.Array:
    """Mean return from the same step on of the *other* trajectories in a trajectory's group.

    The baseline of RLOO (arXiv 2402.14740), applied to each step: it does not depend on the trajectory itself, so
    subtracting it from the return of a step leaves the policy gradient unbiased, and it removes the variance that comes
    from how hard the question is and from how much reward is still to come. (One baseline for the whole trajectory
    would be too high for its last steps, whose returns lack what the first steps have earned.)

    Args:
        returns_NK: float [N, K], from each step on.
        mask_NK: bool [N, K], True = the trajectory has this step.
        groups_N: int [N], number of the trajectory's question, in [0, N).

    Returns:
        float32 [N, K]; where no other trajectory of the group has the step, the mean over all others in the batch; 0
        where none of those has it either, and where mask is False.
    """
    mask_NK = mask_NK.astype(jnp.float32)
    returns_NK = jnp.where(mask_NK > 0, returns_NK.astype(jnp.float32), 0.0)

    def mean_of_others(groups_N: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = _group_sum(mask_NK, groups_N) - mask_NK
        return (_group_sum(returns_NK, groups_N) - returns_NK) / jnp.maximum(count, 1), count

    of_group, count = mean_of_others(groups_N)
    of_batch, _ = mean_of_others(jnp.zeros_like(groups_N))
    return mask_NK * jnp.where(count > 0, of_group, of_batch)


def group_mean_std(returns_NK: jax.Array, mask_NK: jax.Array, groups_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the returns from the same step on, over a trajectory's group with itself.

    The baseline of GRPO (arXiv 2402.03300, section 4.1.2), applied to each step. The deviation of n returns is over
    n - 1, as of torch.std in TRL and verl; 0 of one return.

    Args:
        returns_NK, mask_NK, groups_N: as of `leave_one_out`.

    Returns:
        mean_NK and std_NK, float32 [N, K], 0 where mask is False.
    """
    mask_NK = mask_NK.astype(jnp.float32)
    count = _group_sum(mask_NK, groups_N)
    total = _group_sum(jnp.where(mask_NK > 0, returns_NK.astype(jnp.float32), 0.0), groups_N)
    mean_NK = total / jnp.maximum(count, 1)
    centred_NK = jnp.where(mask_NK > 0, returns_NK - mean_NK, 0.0)
    variance_NK = _group_sum(jnp.square(centred_NK), groups_N) / jnp.maximum(count - 1, 1)
    return mask_NK * mean_NK, mask_NK * jnp.sqrt(variance_NK)


def _group_sum(x_NK: jax.Array, groups_N: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(x_NK, groups_N, len(groups_N))[groups_N]


def whiten(x: jax.Array, mask: jax.Array, *, std_floor: float = STD_FLOOR) -> jax.Array:
    """Shift and scale the kept entries to mean 0 and standard deviation 1, over all axes at once.

    Args:
        x: float [...], any shape.
        mask: bool of the same shape, True = keep.
        std_floor: with a smaller deviation all entries become 0: they differ by rounding alone, which the division
            would scale up to full-sized updates.

    Returns:
        float32 of the same shape, 0 where not kept; all 0 when nothing is kept or nothing differs.
    """
    x = x.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    centred = jnp.where(mask, x - jnp.sum(jnp.where(mask, x, 0.0)) / count, 0.0)
    std = jnp.sqrt(jnp.sum(jnp.square(centred)) / count)
    return jnp.where(std > std_floor, centred / jnp.maximum(std, std_floor), 0.0)


def whiten_rewards(table: TrajectoryTable) -> TrajectoryTable:
    """Scale the step rewards of an iteration to standard deviation 1 and keep their mean (arXiv 2403.17031).

    Rewards that are all equal are kept.
    """
    is_end_NT = jax.vmap(ends)(table.step_ids, table.mask)
    count = jnp.maximum(jnp.sum(is_end_NT, dtype=jnp.float32), 1.0)
    mean = jnp.sum(jnp.where(is_end_NT, table.rewards, 0.0)) / count
    rewards = jnp.where(is_end_NT, whiten(table.rewards, is_end_NT) + mean, 0.0)
    return dataclasses.replace(table, rewards=rewards)

"""Advantage estimates, and what they are made of: returns along a trajectory, baselines of a group, whitening.

Shape suffixes: N trajectories, T policy tokens of one, K its steps. Everything is a pure function of one trajectory or
of an iteration's table of them (`types.TrajectoryTable`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from r3rag_jax.config import RLConfig
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

    (arXiv 1506.02438, eq. 16, with a discount per token), where t' is the next *kept* token: what is not kept is
    stepped over. A discount of 0 ends an episode, and so does the last kept token (a limit on steps ends a
    trajectory; nothing is bootstrapped). With values of 0 and lam = 1 the advantages are discounted returns.

    Args:
        rewards_T: float [T]; a reward on a token that is not kept is ignored.
        values_T: float [T], V of the state before each token; may hold anything where not kept.
        discounts_T: float [T], weight of what comes after the token; may hold anything where not kept.
        mask_T: bool [T], True = keep (tokens the policy generated).
        lam: weight of the longer returns, 0 = one-step TD, 1 = Monte Carlo.

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

    With step_discount 0 each step is its own episode, as in the released code of arXiv 2505.23794; with 1 credit
    flows across the whole trajectory. Between them step k is credited with G_k = r_k + step_discount G_(k+1).

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


def leave_one_out(returns_NK: jax.Array, mask_NK: jax.Array, groups_N: jax.Array) -> jax.Array:
    """What the *other* trajectories of each one's group earn from the same step on, on average.

    The baseline of RLOO (arXiv 2402.14740), step by step: it does not depend on what the trajectory itself
    does, so subtracting it from the return of a step leaves the policy gradient unbiased, and it takes out how hard the
    question is and how much of the reward is still to come. (One baseline for the whole trajectory would count
    against its last steps what the first ones have earned.)

    Args:
        returns_NK: float [N, K], from each step on. mask_NK: bool [N, K], the steps that a trajectory has.
        groups_N: int [N], its question, in [0, N).

    Returns:
        float32 [N, K]; where no other of the group has the step, the mean of all others in the batch; 0 where no
        other has it, and where mask is False.
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
    """Mean and standard deviation of what each one's group, itself included, earns from the same step on.

    The baseline of GRPO (arXiv 2402.03300, section 4.1.2), step by step. The deviation is that of the population.

    Args:
        returns_NK, mask_NK, groups_N: as of `leave_one_out`.

    Returns:
        mean_NK and std_NK, float32 [N, K], 0 where mask is False.
    """
    mask_NK = mask_NK.astype(jnp.float32)
    count = jnp.maximum(_group_sum(mask_NK, groups_N), 1)
    mean_NK = _group_sum(jnp.where(mask_NK > 0, returns_NK.astype(jnp.float32), 0.0), groups_N) / count
    centred_NK = jnp.where(mask_NK > 0, returns_NK - mean_NK, 0.0)
    return mask_NK * mean_NK, mask_NK * jnp.sqrt(_group_sum(jnp.square(centred_NK), groups_N) / count)


def _group_sum(x_NK: jax.Array, groups_N: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(x_NK, groups_N, len(groups_N))[groups_N]


def whiten(x: jax.Array, mask: jax.Array, *, std_floor: float = STD_FLOOR) -> jax.Array:
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


def whiten_rewards(table: TrajectoryTable) -> TrajectoryTable:
    """Scale the step rewards of an iteration to standard deviation 1 and keep their mean (arXiv 2403.17031).

    Equal rewards stay as they are.
    """
    is_end_NT = jax.vmap(ends)(table.step_ids, table.mask)
    count = jnp.maximum(jnp.sum(is_end_NT, dtype=jnp.float32), 1.0)
    mean = jnp.sum(jnp.where(is_end_NT, table.rewards, 0.0)) / count
    rewards = jnp.where(is_end_NT, whiten(table.rewards, is_end_NT) + mean, 0.0)
    return TrajectoryTable(table.places, rewards, table.step_ids, table.mask, table.groups)


def estimate(
    values_NT: jax.Array,
    penalties_NT: jax.Array,
    learnt_NT: jax.Array,
    table: TrajectoryTable,
    config: RLConfig,
    num_steps: int,
) -> tuple[jax.Array, jax.Array]:
    """Advantages by `config.algorithm`, and returns, of all tokens of an iteration.

        R_t  = penalised reward            r_t - penalties_t
        G_t  = return from token t on      R_t + gamma_t G_{t+1}, gamma_t by `discounts`; with `returns` total: sum R
        ppo          A_t = generalised advantage estimate with the critic's values (`gae`)
        reinforce++  A_t = G_t                           the batch's mean and deviation are `whiten_advantages`
        rloo         A_t = G_t - mean of the others'     (`leave_one_out`)
        grpo         A_t = G_t - mean of the group's     (`group_mean_std`), over the group's deviation with `std`

    A baseline is of G on the first token of the step that t belongs to. After it the advantages are whitened over all
    learnt tokens with `whiten_advantages`, and negative ones weighed by `negative_weight`: what did worse than expected
    pushes down every token it wrote, the right ones among them; they were nearly certain, so the push grows as they
    yield, and entropy rises. With 0 only what did better is learnt (RAFT++, arXiv 2504.11343).

    Args:
        values_NT: float [N, T], of a critic; only ppo looks at them.
        penalties_NT: float [N, T], in units of the reward, e.g. the weighted KL to a reference.
        learnt_NT: bool [N, T], tokens of the updates' batches; whole trajectories that are left out count in baselines.
        num_steps: most steps of a trajectory, K.

    Returns:
        advantages_NT, and returns_NT that a critic is trained towards, float32, 0 where nothing is learnt.
    """
    mask_NT, step_ids_NT = table.mask, table.step_ids
    rewards_NT = jnp.where(mask_NT, table.rewards - penalties_NT, 0.0)
    along = functools.partial(discounts, gamma=config.gamma, step_discount=config.step_discount)
    lam = config.critic.gae_lambda if config.has_critic else 1.0
    advantages_NT, returns_NT = jax.vmap(functools.partial(gae, lam=lam))(
        rewards_NT,
        values_NT if config.has_critic else jnp.zeros_like(rewards_NT),
        jax.vmap(along)(step_ids_NT, mask_NT),
        mask_NT,
    )
    if config.returns == "total":
        returns_NT = jnp.where(mask_NT, jnp.sum(rewards_NT, axis=1, keepdims=True), 0.0)
        advantages_NT, step_ids_NT, num_steps = returns_NT, jnp.zeros_like(step_ids_NT), 1
    if config.is_grouped:
        starts = jax.vmap(functools.partial(at_step_starts, num_steps=num_steps))
        returns_NK = starts(returns_NT, step_ids_NT, mask_NT)
        has_step_NK = starts(jnp.ones_like(mask_NT), step_ids_NT, mask_NT)
        of_step = lambda x_NK: jnp.take_along_axis(x_NK, step_ids_NT, axis=1)  # noqa: E731
        if config.algorithm == "rloo":
            advantages_NT = returns_NT - of_step(leave_one_out(returns_NK, has_step_NK, table.groups))
        else:
            mean_NK, std_NK = group_mean_std(returns_NK, has_step_NK, table.groups)
            advantages_NT = returns_NT - of_step(mean_NK)
            if config.normalize_std:
                std_NT = of_step(std_NK)
                advantages_NT = jnp.where(std_NT > STD_FLOOR, advantages_NT / jnp.maximum(std_NT, STD_FLOOR), 0.0)
    learnt_NT = learnt_NT & mask_NT
    advantages_NT = whiten(advantages_NT, learnt_NT) if config.whiten_advantages else advantages_NT
    advantages_NT = jnp.where(advantages_NT < 0, config.negative_weight * advantages_NT, advantages_NT)
    return jnp.where(learnt_NT, advantages_NT, 0.0), jnp.where(learnt_NT, returns_NT, 0.0)

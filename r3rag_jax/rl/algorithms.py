"""RL algorithms: the table of them, and what each adds to the shared maths of advantages and losses.

A new algorithm is one row of ALGORITHMS and the functions that the row names; `rl.algorithm` lists its name.
Shape suffixes: N trajectories, T policy tokens of one, K its steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from r3rag_jax.config import RLConfig
from r3rag_jax.rl.advantages import STD_FLOOR, at_step_starts, gae, group_mean_std, leave_one_out
from r3rag_jax.rl.losses import ppo_policy_loss

Mean = Callable[[jax.Array, jax.Array], jax.Array]  # (values of tokens, mask) -> scalar
Stats = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Credit:
    """What the advantages of an iteration's trajectories are computed from; what an algorithm does not read is free."""

    rewards: jax.Array  # float32 [N, T], after penalties, on the last token of each step; 0 where not kept
    returns: jax.Array  # float32 [N, T], from each token on, or (`rl.returns: total`) of the whole trajectory
    values: jax.Array  # float32 [N, T], of the critic; anything where not kept, 0 for algorithms without a critic
    discounts: jax.Array  # float32 [N, T], weight of what comes after the token
    step_ids: jax.Array  # int32 [N, T]; all 0 with `rl.returns: total`, where a trajectory is one step
    mask: jax.Array  # bool [N, T], True = keep
    groups: jax.Array  # int32 [N], number of the question, in [0, N)
    num_steps: int  # K


class PolicyLoss(Protocol):
    """Loss of the policy on a batch of tokens, arrays of one shape; see `ppo_policy_loss` for the arguments."""

    def __call__(
        self,
        logprobs: jax.Array,
        old_logprobs: jax.Array,
        advantages: jax.Array,
        mask: jax.Array,
        config: RLConfig,
        *,
        weights: jax.Array | None,
        mean: Mean,
    ) -> tuple[jax.Array, Stats]:
        """The scalar loss, aggregated by `mean`, and stats for the log.

        Stats are means over kept tokens, but `displacement`, which is one over kept tokens of positive advantage.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A row of ALGORITHMS."""

    advantages: Callable[[Credit, RLConfig], jax.Array]  # float32 [N, T], before whitening; anything where not kept
    policy_loss: PolicyLoss
    needs_critic: bool = False  # a value model is trained towards advantages + values
    is_grouped: bool = False  # a trajectory is compared with the other samples of its question


def ppo_advantages(credit: Credit, config: RLConfig) -> jax.Array:
    """A_t: generalised advantage estimates with the critic's values (`gae`)."""
    estimates = jax.vmap(functools.partial(gae, lam=config.critic.gae_lambda))
    return estimates(credit.rewards, credit.values, credit.discounts, credit.mask)[0]


def reinforce_advantages(credit: Credit, config: RLConfig) -> jax.Array:
    """A_t = G_t; its baseline is the mean over the batch, which `rl.whiten_advantages` subtracts."""
    return credit.returns


def rloo_advantages(credit: Credit, config: RLConfig) -> jax.Array:
    """A_t = G_t - mean of the others' returns (`leave_one_out`), of the first token of the step that t belongs to."""
    returns_NK, mask_NK = _returns_of_steps(credit)
    return credit.returns - _at_tokens(leave_one_out(returns_NK, mask_NK, credit.groups), credit)


def grpo_advantages(credit: Credit, config: RLConfig) -> jax.Array:
    """A_t = G_t - mean of the group's returns (`group_mean_std`), of the first token of the step that t belongs to.

    With `rl.normalize_std` A_t is divided by their standard deviation.
    """
    mean_NK, std_NK = group_mean_std(*_returns_of_steps(credit), credit.groups)
    advantages_NT = credit.returns - _at_tokens(mean_NK, credit)
    if not config.normalize_std:
        return advantages_NT
    std_NT = _at_tokens(std_NK, credit)
    return jnp.where(std_NT > STD_FLOOR, advantages_NT / jnp.maximum(std_NT, STD_FLOOR), 0.0)


def _returns_of_steps(credit: Credit) -> tuple[jax.Array, jax.Array]:
    """Returns on the first token of each step, float32 [N, K], and the steps that there are, bool [N, K]."""
    starts = jax.vmap(functools.partial(at_step_starts, num_steps=credit.num_steps))
    returns_NK = starts(credit.returns, credit.step_ids, credit.mask)
    return returns_NK, starts(jnp.ones_like(credit.mask), credit.step_ids, credit.mask)


def _at_tokens(x_NK: jax.Array, credit: Credit) -> jax.Array:
    """[N, T]: of each token, the entry of its step."""
    return jnp.take_along_axis(x_NK, credit.step_ids, axis=1)


def clipped_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    config: RLConfig,
    *,
    weights: jax.Array | None,
    mean: Mean,
) -> tuple[jax.Array, Stats]:
    """`ppo_policy_loss` with the bounds of the configuration."""
    return ppo_policy_loss(
        logprobs, old_logprobs, advantages, mask,
        clip=config.clip or None, clip_high=config.clip_high or None, weights=weights, mean=mean,
    )  # fmt: skip


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(ppo_advantages, clipped_loss, needs_critic=True),
    "grpo": Algorithm(grpo_advantages, clipped_loss, is_grouped=True),
    "rloo": Algorithm(rloo_advantages, clipped_loss, is_grouped=True),
    "reinforce++": Algorithm(reinforce_advantages, clipped_loss),
}

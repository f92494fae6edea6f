"""From rewards to advantages: what all algorithms share, around the advantage function of the configured one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from r3rag_jax.config import RLConfig
from r3rag_jax.rl.advantages import discounts, gae, whiten
from r3rag_jax.rl.algorithms import ALGORITHMS, Credit
from r3rag_jax.types import TrajectoryTable


def estimate(
    values_NT: jax.Array,
    penalties_NT: jax.Array,
    learnt_NT: jax.Array,
    table: TrajectoryTable,
    config: RLConfig,
    num_steps: int,
) -> tuple[jax.Array, jax.Array]:
    """Advantages and returns of all tokens of an iteration, by `config.algorithm`.

        R_t  = penalised reward            r_t - penalties_t
        G_t  = return from token t on      R_t + gamma_t G_{t+1}, gamma_t by `discounts`; with `returns` total: sum R
        A_t  = of G, R and the values      the `advantages` of the algorithm's row in ALGORITHMS

    Then the advantages are whitened over all learnt tokens with `whiten_advantages`, and negative ones are multiplied
    by `negative_weight`: a trajectory that did worse than expected makes every token in it less likely, also those that
    were right; they were nearly certain, so the push grows while they yield, and the entropy rises. With 0 the policy
    learns only from what did better (RAFT++, arXiv 2504.11343).

    Args:
        values_NT: float [N, T], of a critic; read by algorithms with one.
        penalties_NT: float [N, T], in units of the reward, e.g. the weighted KL to a reference.
        learnt_NT: bool [N, T], tokens of the updates' batches; whole trajectories that are left out count in baselines.
        num_steps: K, the most steps of a trajectory.

    Returns:
        advantages_NT, and returns_NT that a critic is trained towards, float32, 0 where nothing is learnt.
    """
    algorithm = ALGORITHMS[config.algorithm]
    values_NT = values_NT if algorithm.needs_critic else jnp.zeros_like(values_NT)
    credit = _credit(values_NT, penalties_NT, table, config, num_steps)
    advantages_NT = algorithm.advantages(credit, config)
    returns_NT = advantages_NT + values_NT if algorithm.needs_critic else credit.returns
    learnt_NT = learnt_NT & table.mask
    advantages_NT = whiten(advantages_NT, learnt_NT) if config.whiten_advantages else advantages_NT
    advantages_NT = jnp.where(advantages_NT < 0, config.negative_weight * advantages_NT, advantages_NT)
    return jnp.where(learnt_NT, advantages_NT, 0.0), jnp.where(learnt_NT, returns_NT, 0.0)


def _credit(
    values_NT: jax.Array, penalties_NT: jax.Array, table: TrajectoryTable, config: RLConfig, num_steps: int
) -> Credit:
    mask_NT, step_ids_NT = table.mask, table.step_ids
    rewards_NT = jnp.where(mask_NT, table.rewards - penalties_NT, 0.0)
    weight_of_rest = functools.partial(discounts, gamma=config.gamma, step_discount=config.step_discount)
    discounts_NT = jax.vmap(weight_of_rest)(step_ids_NT, mask_NT)
    if config.returns == "total":
        returns_NT = jnp.where(mask_NT, jnp.sum(rewards_NT, axis=1, keepdims=True), 0.0)
        step_ids_NT, num_steps = jnp.zeros_like(step_ids_NT), 1
    else:  # advantages over values of 0 with lambda 1
        to_go = jax.vmap(functools.partial(gae, lam=1.0))
        returns_NT = to_go(rewards_NT, jnp.zeros_like(rewards_NT), discounts_NT, mask_NT)[1]
    return Credit(rewards_NT, returns_NT, values_NT, discounts_NT, step_ids_NT, mask_NT, table.groups, num_steps)

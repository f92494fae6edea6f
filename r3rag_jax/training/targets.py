"""What an iteration of RL computes before its first update: values, log-probabilities, advantages, returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from r3rag_jax.config import ModelConfig, RLConfig
from r3rag_jax.parallel.collectives import per_device
from r3rag_jax.parallel.shardings import device_put_batch, device_put_global, replicated
from r3rag_jax.parallel.target import Target
from r3rag_jax.rl.advantages import token_shares, whiten_rewards
from r3rag_jax.rl.algorithms import ALGORITHMS
from r3rag_jax.rl.estimator import estimate
from r3rag_jax.rl.losses import kl_penalty, masked_mean, truncated_weights
from r3rag_jax.sampler.distribution import WHOLE, Truncation
from r3rag_jax.training.losses import join_modules, policy_logprobs
from r3rag_jax.training.micro_batches import ROWS, check_rows, param_specs
from r3rag_jax.training.state import Metrics, PreUpdate, Targets, hidden_states
from r3rag_jax.types import TrainBatch, TrajectoryTable


def make_pre_update(
    mesh: Mesh,
    graphdefs: dict[str, Any],
    reference: Any,
    model: ModelConfig,
    config: RLConfig,
    truncation: Truncation = WHOLE,
    records_entropy: bool = False,
) -> Callable[..., tuple[PreUpdate, Metrics]]:
    """The jitted forward passes, (params, reference policy's params, batch, frozen) -> (PreUpdate, metrics).

    `reference` is the reference policy's graphdef: that of the policy, without adapters. Only what the configuration
    needs is computed. All log-probabilities are at the sampling temperature. The metric `kl` is k1, whatever the
    penalty is: of the sampled tokens, the sampler's log-probability minus the reference's.
    """
    target = Target.of(mesh).shard()

    def forward(params: Any, ref_params: Any, frozen: Any, batch: TrainBatch) -> tuple[jax.Array | None, ...]:
        """(values, ref_logprobs, old_logprobs, entropy) of a device's rows."""
        modules = join_modules(graphdefs, params, frozen)
        values = ref_logprobs = old_logprobs = entropy = hidden = None
        if config.max_importance_weight > 0 or records_entropy:
            old_logprobs, entropy, hidden = policy_logprobs(modules["policy"], batch, "none", truncation, target)
        if not config.max_importance_weight > 0:
            old_logprobs = None
        if "critic" in modules:
            hidden = hidden_states(modules["policy"], batch, "none", target) if hidden is None else hidden
            values = modules["critic"](batch, hidden, "none", target)
        if config.kl.coef > 0:
            ref_logprobs, _, _ = policy_logprobs(nnx.merge(reference, ref_params), batch, "none", truncation, target)
        return values, ref_logprobs, old_logprobs, entropy if records_entropy else None

    def pre_update(params: Any, ref_params: Any, batch: TrainBatch, frozen: Any = None) -> tuple[PreUpdate, Metrics]:
        check_rows(mesh, batch.tokens.shape[0])
        arguments = params, ref_params, frozen, batch
        in_specs = *(param_specs(mesh, tree) for tree in arguments[:3]), ROWS
        values, ref_logprobs, old_logprobs, entropy = per_device(mesh, forward, in_specs, ROWS)(*arguments)
        penalties = weights = None
        metrics: Metrics = {}
        if old_logprobs is not None:
            most, behaviour = config.max_importance_weight, batch.behaviour_logprobs
            weights, stats = truncated_weights(old_logprobs, behaviour, batch.loss_mask, most)
            metrics |= stats
        if ref_logprobs is not None:
            metrics["kl"] = masked_mean(kl_penalty(batch.behaviour_logprobs, ref_logprobs, "k1"), batch.loss_mask)
            if config.kl.placement == "reward":
                penalties = kl_penalty(batch.behaviour_logprobs, ref_logprobs, config.kl.estimator)
                ref_logprobs = None
        return PreUpdate(values, penalties, ref_logprobs, old_logprobs, weights, entropy), metrics

    # Whole on every device: credit flows between rows.
    return jax.jit(pre_update, out_shardings=replicated(mesh))


def make_targets(
    mesh: Mesh, config: RLConfig, *, num_steps: int
) -> Callable[[list[PreUpdate], TrajectoryTable, float, tuple[int, int]], tuple[list[Targets], Metrics]]:
    """The jitted credit assignment, (PreUpdate of each batch, table of their tokens, weight of the KL, (B, L)) ->
    (Targets of each batch, metrics).

    `rl.estimator.estimate` runs over all trajectories of the iteration, whatever rows and batches their tokens lie in.
    With a critic, the metrics say how much of the returns it explains. `num_steps`: most steps of a trajectory.
    """

    def on_table(found: list[PreUpdate], table: TrajectoryTable, kl: Any, shape: tuple[int, int]) -> Any:
        size = len(found) * shape[0] * shape[1]

        def gather(name: str) -> jax.Array:
            if getattr(found[0], name) is None:
                return jnp.zeros_like(table.rewards)
            flat = jnp.stack([getattr(of_batch, name) for of_batch in found]).ravel()
            return jnp.where(table.mask, flat.at[table.indices].get(mode="fill", fill_value=0), 0.0)

        def scatter(x_NT: jax.Array) -> list[jax.Array]:
            flat = jnp.zeros(size, jnp.float32).at[table.indices].set(x_NT, mode="drop")
            return list(flat.reshape(len(found), *shape))

        table = whiten_rewards(table) if config.whiten_rewards else table
        values, mask = gather("values"), table.mask & (table.indices < size)
        advantages, returns = estimate(values, kl * gather("penalties"), mask, table, config, num_steps)
        targets = [Targets(a) for a in scatter(advantages)]
        metrics: Metrics = {}
        if ALGORITHMS[config.algorithm].needs_critic:
            both = zip(targets, scatter(returns), scatter(values), strict=True)
            targets = [dataclasses.replace(t, returns=r, old_values=v) for t, r, v in both]
            metrics = _critic_metrics(values, returns, mask)
        if config.loss_aggregation != "token":
            shares = token_shares(table.step_ids, mask, num_steps if config.loss_aggregation == "step" else None)
            targets = [dataclasses.replace(t, shares=s) for t, s in zip(targets, scatter(shares), strict=True)]
        return targets, metrics

    jitted = jax.jit(on_table, static_argnums=3)

    def targets_of(
        found: list[PreUpdate], table: TrajectoryTable, kl: float, shape: tuple[int, int]
    ) -> tuple[list[Targets], Metrics]:
        table = device_put_global(table, jax.tree.map(lambda _: replicated(mesh), table))
        targets, metrics = jitted(found, table, np.float32(kl), shape)
        constants = ("ref_logprobs", "old_logprobs", "weights")
        targets = [
            dataclasses.replace(t, **{name: getattr(of_batch, name) for name in constants})
            for t, of_batch in zip(targets, found, strict=True)
        ]
        return device_put_batch(mesh, targets), metrics

    return targets_of


def _critic_metrics(values_NT: jax.Array, returns_NT: jax.Array, mask_NT: jax.Array) -> Metrics:
    """The mean value, and the share of the returns' variance that the values explain."""
    spread = masked_mean(jnp.square(returns_NT - masked_mean(returns_NT, mask_NT)), mask_NT)
    error = returns_NT - values_NT
    unexplained = masked_mean(jnp.square(error - masked_mean(error, mask_NT)), mask_NT)
    return {
        "explained_variance": 1.0 - unexplained / jnp.maximum(spread, 1e-8),
        "value": masked_mean(values_NT, mask_NT),
    }

"""The updates of SFT and RL: functional, jitted, donated, sharded over the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from r3rag_jax.config import ModelConfig, RLConfig
from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.parallel.collectives import compiler_options
from r3rag_jax.parallel.shardings import replicated, tree_shardings
from r3rag_jax.parallel.target import Target
from r3rag_jax.sampler.distribution import WHOLE, Truncation
from r3rag_jax.training.losses import rl_loss, sft_loss
from r3rag_jax.training.micro_batches import BatchShare, value_and_grad
from r3rag_jax.training.state import Metrics, Targets, TrainState
from r3rag_jax.types import SFTBatch, TrainBatch


def make_sft_step(
    mesh: Mesh, graphdef: Any, tx: optax.GradientTransformationExtraArgs, model: ModelConfig, state: TrainState
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted SFT update, (state, batch, frozen) -> (state, metrics); the state is donated."""
    target = Target.of(mesh).shard()

    def loss(params: Any, frozen: Any, batch: SFTBatch, share: BatchShare) -> tuple[jax.Array, Metrics]:
        return sft_loss(graphdef, params, batch, model.remat, target, frozen, share)

    def step(state: TrainState, batch: SFTBatch, frozen: Any = None) -> tuple[TrainState, Metrics]:
        found = value_and_grad(mesh, loss, state.params, frozen, (batch,), model.micro_tokens)
        return _update(tx, state, 1.0, found)

    return _jit_step(mesh, step, state)


def make_rl_step(
    mesh: Mesh,
    graphdefs: dict[str, Any],
    tx: optax.GradientTransformationExtraArgs,
    model: ModelConfig,
    config: RLConfig,
    state: TrainState,
    truncation: Truncation = WHOLE,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted RL update, (state, batch, targets, lr_scale, frozen, kl) -> (state, metrics); the state is donated."""
    target = Target.of(mesh).shard()

    def loss(
        params: Any, constants: Any, batch: TrainBatch, targets: Targets, share: BatchShare
    ) -> tuple[jax.Array, Metrics]:
        frozen, kl = constants
        return rl_loss(graphdefs, params, batch, targets, config, model.remat, target, truncation, frozen, kl, share)

    def step(
        state: TrainState, batch: TrainBatch, targets: Targets, lr_scale: jax.Array, frozen: Any = None, kl: Any = None
    ) -> tuple[TrainState, Metrics]:
        found = value_and_grad(mesh, loss, state.params, (frozen, kl), (batch, targets), model.micro_tokens)
        return _update(tx, state, lr_scale, found)

    return _jit_step(mesh, step, state)


def _update(
    tx: optax.GradientTransformationExtraArgs, state: TrainState, lr_scale: Any, found: tuple[Any, Any]
) -> tuple[TrainState, Metrics]:
    """Apply gradients. A NaN or infinite loss or gradient changes nothing but the count of steps.

    `found`: what `value_and_grad` returns.
    """
    (value, metrics), grads = found
    metrics["grad_norm"] = optax.tree.norm(grads)
    is_finite = jnp.isfinite(value) & jnp.isfinite(metrics["grad_norm"])
    updates, opt_state = tx.update(grads, state.opt_state, state.params, is_finite=is_finite)

    def moved(param: jax.Array, update: jax.Array) -> jax.Array:
        return jnp.where(is_finite, param + lr_scale * update, param)  # Adam's update is linear in its rate

    return TrainState(state.step + 1, jax.tree.map(moved, state.params, updates), opt_state), metrics


def _jit_step(mesh: Mesh, step: Callable[..., Any], state: TrainState) -> Callable[..., Any]:
    shardings = tree_shardings(mesh, state, PARAM_AXES)
    options = compiler_options(Target.of(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)), compiler_options=options)

"""AdamW for SFT and RL, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from r3rag_jax.config import RLConfig, SFTConfig


def schedule(progress: Any, warmup: float, final: float) -> Any:
    """Fraction of the peak learning rate at `progress` in [0, 1]: linear warm-up, then cosine decay to `final`."""
    rising = progress / max(warmup, 1e-9)
    falling = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * (progress - warmup) / max(1 - warmup, 1e-9)))
    return jnp.where(progress < warmup, rising, falling)


def sft_optimizer(
    config: SFTConfig, num_steps: int, moment_dtype: jax.typing.DTypeLike = jnp.float32
) -> optax.GradientTransformationExtraArgs:
    """AdamW after clipping the gradient's global norm, with a learning-rate schedule over `num_steps` updates."""

    def rate(number: jax.Array) -> jax.Array:
        return config.lr * schedule(number / (num_steps + 1), config.warmup, 0.0)

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        adamw(rate, weight_decay=config.weight_decay, moment_dtype=moment_dtype),
    )


def rl_optimizer(
    config: RLConfig, moment_dtype: jax.typing.DTypeLike = jnp.float32
) -> optax.GradientTransformationExtraArgs:
    """AdamW for policy and critic, each with its own peak learning rate and its own gradient clipping.

    The schedule is applied by the update step (`lr_scale`), because the number of updates in an iteration depends on
    the lengths of its trajectories.
    """

    def one(lr: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm),
            adamw(lambda _: lr, b2=0.95, eps=config.adam_eps, moment_dtype=moment_dtype),
        )

    return optax.multi_transform(
        {"policy": one(config.lr), "critic": one(config.critic.lr)},
        lambda params: {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in params.items()},
    )


def adamw(
    rate: Callable[[jax.Array], Any],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    moment_dtype: jax.typing.DTypeLike = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """AdamW (arXiv 1711.05101): the results of `optax.adamw`, with moments that are updated in place.

    `optax.adamw` computes both the step and the new moments from the old moments. XLA's CPU backend then computes the
    new moments twice, and copies the old ones before it overwrites them.

    Args:
        rate: number of the update, from 1 -> learning rate.
        moment_dtype: of the first moment. The second one is always float32: an update changes it by a thousandth,
            which is less than bfloat16 can represent.

    Returns:
        A transformation whose `update` takes `is_finite`, bool []: where it is False the state does not change.
    """
    start = optax.scale_by_adam(mu_dtype=moment_dtype)

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any, *, is_finite: jax.Array, **_: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        def moving_mean(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
            mean = decay * old.astype(jnp.float32) + (1 - decay) * new.astype(jnp.float32)
            return jnp.where(is_finite, mean.astype(old.dtype), old)

        mu = jax.tree.map(lambda old, grad: moving_mean(old, grad, b1), state.mu, grads)
        nu = jax.tree.map(lambda old, grad: moving_mean(old, jnp.square(grad), b2), state.nu, grads)
        state = optax.ScaleByAdamState(state.count + is_finite.astype(jnp.int32), mu, nu)
        state = jax.lax.optimization_barrier(state)
        count = jnp.maximum(state.count, 1)

        def step(mu: jax.Array, nu: jax.Array, param: jax.Array) -> jax.Array:
            mean, square = mu.astype(jnp.float32) / (1 - b1**count), nu / (1 - b2**count)
            return -rate(count) * (mean / (jnp.sqrt(square) + eps) + weight_decay * param)

        return jax.tree.map(step, state.mu, state.nu, params), state

    return optax.GradientTransformationExtraArgs(start.init, update)

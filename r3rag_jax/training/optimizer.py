"""AdamW for both phases, and the schedule of its rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from r3rag_jax.config import RLConfig, SFTConfig


def schedule(progress: Any, warmup: float, final: float) -> Any:
    """Share of the peak learning rate at `progress` in [0, 1]: linear warm-up, then cosine down to `final`."""
    rising = progress / max(warmup, 1e-9)
    falling = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * (progress - warmup) / max(1 - warmup, 1e-9)))
    return jnp.where(progress < warmup, rising, falling)


def sft_optimizer(
    config: SFTConfig, num_steps: int, moment_dtype: jax.typing.DTypeLike = jnp.float32
) -> optax.GradientTransformationExtraArgs:
    """AdamW behind global-norm clipping; the schedule runs over the known number of steps."""

    def rate(number: jax.Array) -> jax.Array:
        return config.lr * schedule(number / (num_steps + 1), config.warmup, 0.0)

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        adamw(rate, weight_decay=config.weight_decay, moment_dtype=moment_dtype),
    )


def rl_optimizer(
    config: RLConfig, moment_dtype: jax.typing.DTypeLike = jnp.float32
) -> optax.GradientTransformationExtraArgs:
    """Policy and critic each have a peak learning rate and a clipped gradient of their own.

    The schedule comes with each update (`lr_scale`): how many updates an iteration holds depends on how long
    its trajectories are.
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
    """The numbers of `optax.adamw` (arXiv 1711.05101), whose moments take the place of the old ones at once.

    In `optax.adamw` the step is a function of the old moments and the gradient, as the new moments are. XLA's CPU
    backend then computes these twice, once for each, and has to copy all of the old ones before it overwrites them.

    Args:
        rate: of the number of the update, from 1, the learning rate.
        moment_dtype: of the first moment. The second is float32: an update changes it by a thousandth, which is less
            than bfloat16 can tell.

    Its `update` needs `is_finite`, bool []: where it is not set the state stays what it was.
    """
    start = optax.scale_by_adam(mu_dtype=moment_dtype)

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any, *, is_finite: jax.Array, **_: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        def mean(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
            moved = decay * old.astype(jnp.float32) + (1 - decay) * new.astype(jnp.float32)
            return jnp.where(is_finite, moved.astype(old.dtype), old)

        mu = jax.tree.map(lambda old, grad: mean(old, grad, b1), state.mu, grads)
        nu = jax.tree.map(lambda old, grad: mean(old, jnp.square(grad), b2), state.nu, grads)
        state = optax.ScaleByAdamState(state.count + is_finite.astype(jnp.int32), mu, nu)
        state = jax.lax.optimization_barrier(state)
        count = jnp.maximum(state.count, 1)

        def step(mu: jax.Array, nu: jax.Array, param: jax.Array) -> jax.Array:
            mean, square = mu.astype(jnp.float32) / (1 - b1**count), nu / (1 - b2**count)
            return -rate(count) * (mean / (jnp.sqrt(square) + eps) + weight_decay * param)

        return jax.tree.map(step, state.mu, state.nu, params), state

    return optax.GradientTransformationExtraArgs(start.init, update)

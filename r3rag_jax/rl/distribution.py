"""The distribution that a policy's logits stand for: one definition for the sampler and for the trainer."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def truncate(logits: jax.Array, min_p: float, target: jax.Array | None = None) -> jax.Array:
    """Logits [..., V] with the unlikely ones at -inf: those of less than `min_p` times the largest probability.

    (min-p sampling, arXiv 2407.01082.) A small policy, or a warm one, has thousands of tokens that are never right
    and together are sampled all the time; each of them ends a trajectory, and a policy gradient is mostly
    about them. `min_p` of 0 keeps all. Divide by the temperature before.

    Args:
        target: int [...], kept in any case: a token sampled before an update may have fallen below since.
    """
    if min_p == 0:
        return logits
    keep = logits >= jnp.max(logits, axis=-1, keepdims=True) + math.log(min_p)
    if target is not None:
        keep |= jnp.arange(logits.shape[-1]) == target[..., None]
    return jnp.where(keep, logits, -jnp.inf)

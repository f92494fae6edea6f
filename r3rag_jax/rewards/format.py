"""The format reward; whether a step is well formed is the protocol's verdict, given as a mask.

Shape suffixes: B trajectories, K steps.
"""

import jax
import jax.numpy as jnp


@jax.jit
def format_rewards(rewards_BK: jax.Array, malformed_BK: jax.Array, malformed_reward: float | jax.Array) -> jax.Array:
    """Give malformed steps `malformed_reward`, whatever they had before; float32 [B, K]."""
    return jnp.where(malformed_BK, jnp.float32(malformed_reward), rewards_BK.astype(jnp.float32))


@jax.jit
def malformed_fraction(malformed_BK: jax.Array, step_mask_BK: jax.Array) -> jax.Array:
    """Share of the steps taken that are malformed, a float32 scalar; 0 when no step was taken."""
    num_malformed = jnp.sum(malformed_BK & step_mask_BK, dtype=jnp.float32)
    return num_malformed / jnp.maximum(jnp.sum(step_mask_BK, dtype=jnp.float32), 1.0)

"""The format reward; whether a step is well formed is the protocol's verdict, given as a mask.

Shape suffixes: B trajectories, K steps.
"""

import jax
import jax.numpy as jnp


@jax.jit
def format_rewards(rewards_BK: jax.Array, malformed_BK: jax.Array, malformed_reward: float | jax.Array) -> jax.Array:
    """Give malformed steps `malformed_reward`, whatever they had before; float32 [B, K]."""
    return jnp.where(malformed_BK, jnp.float32(malformed_reward), rewards_BK.astype(jnp.float32))

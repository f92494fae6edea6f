"""Drawing tokens from logits: one uniform number per row, truncated distributions, log-probabilities as sampled."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from r3rag_jax.sampler.distribution import Truncation, truncate
from r3rag_jax.sampler.state import DecodeRows

VOCAB_BLOCK = 64  # tokens of the vocabulary that `first_largest` and `invert` reduce together


def sample(
    logits_BV: jax.Array, rows: DecodeRows, truncation: Truncation, can_branch: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Draw a token per row; returns it, int32 [B], and its log-probability as sampled, float32 [B].

    A greedy row (temperature 0) records its log-probability at temperature 1, at which it is trained.
    """
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
    sampled_BV = truncate(logits_BV, temperature, truncation, can_branch=can_branch)
    largest_B = jnp.max(sampled_BV, axis=1)
    weights_BV = jax.lax.optimization_barrier(
        jnp.exp(sampled_BV - largest_B[:, None])
    )  # computed once, not by each reader

    def draw(key: jax.Array, position: jax.Array, weights_V: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), position)
        return invert(weights_V, jax.random.uniform(key))

    drawn, total_B = jax.vmap(draw)(rows.keys, rows.lengths, weights_BV)
    token = jnp.where(rows.temperature > 0, drawn, jax.vmap(first_largest)(logits_BV))

    def of_token(x_BV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BV, token[:, None], axis=1)[:, 0]

    logprob = of_token(sampled_BV) - largest_B - jnp.log(total_B)
    return token.astype(jnp.int32), logprob


def _blocks(x_V: jax.Array, fill: float) -> jax.Array:
    """[V] -> [blocks, VOCAB_BLOCK]."""
    num_blocks = -(-x_V.shape[0] // VOCAB_BLOCK)
    missing = num_blocks * VOCAB_BLOCK - x_V.shape[0]
    return jnp.pad(x_V, (0, missing), constant_values=fill).reshape(num_blocks, VOCAB_BLOCK)


def first_largest(x_V: jax.Array) -> jax.Array:
    """The argmax: over the blocks' maxima, then inside the block. A CPU takes ten times as long over all at once."""
    blocks = _blocks(x_V, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=1))
    return block * VOCAB_BLOCK + jnp.argmax(blocks[block])


def invert(weights_V: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the v with sum(weights[:v]) <= uniform * sum(weights) < sum(weights[:v + 1]), and the sum of all weights.

    v never has weight 0.

    Inverse transform sampling over sums of blocks, then inside one block: a single random number and two short
    cumulative sums, where the Gumbel trick needs a random number and two logarithms per token of the vocabulary.
    """
    blocks = _blocks(weights_V, 0.0)

    def first_above(sums: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.argmax(
            sums > jnp.clip(target, 0.0, jnp.nextafter(sums[-1], 0.0))
        )  # rounding may push the target past the last sum

    sums = jnp.cumsum(jnp.sum(blocks, axis=1))
    target = uniform * sums[-1]
    block = first_above(sums, target)
    before = jnp.where(block > 0, sums[block - 1], 0.0)
    return block * VOCAB_BLOCK + first_above(jnp.cumsum(blocks[block]), target - before), sums[-1]

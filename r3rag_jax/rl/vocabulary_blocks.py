"""Log-probabilities where devices have shards of the output matrix: a block of the vocabulary at a time.

The forward pass keeps of each token the largest logit, the sum of the exponentials and the like; the backward pass
computes the logits again, and sums a block's gradient over devices before the next block. Loops over tokens have no
collectives, and neither the whole matrix nor its whole gradient exists on a device.

Shape suffixes: D width, V entries of a block, C tokens of a chunk, K chunks.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from r3rag_jax.models.matmul import transpose_copy
from r3rag_jax.parallel.blocks import Blocks
from r3rag_jax.parallel.target import Target

NOTHING = -1e30  # a logit that does not count; finite, since its products with zero must be zero


class BlockedOutput(NamedTuple):
    """How the output matrix is stored and used; static."""

    tied: bool
    target: Target
    blocks: Blocks

    def logits(self, hidden_CD: jax.Array, block: jax.Array) -> jax.Array:
        return _dot(hidden_CD, transpose_copy(block, self.target) if self.tied else block)

    def add_gradients(
        self, grad_block: jax.Array, grad_CV: jax.Array, hidden_CD: jax.Array, block: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Add a chunk to the gradient of a block; returns it and the gradient of the hidden states, in float32."""
        grad_CV = grad_CV.astype(block.dtype)
        left, right = (grad_CV, hidden_CD) if self.tied else (hidden_CD, grad_CV)
        grad_block = grad_block + _dot(transpose_copy(left, self.target), right)
        return grad_block, _dot(grad_CV, block if self.tied else transpose_copy(block, self.target))


class _Sums(NamedTuple):
    """What is known of tokens after some blocks, [C]."""

    largest: jax.Array  # float32, logit
    total: jax.Array  # float32, sum of exp(logit - largest)
    weighted: jax.Array  # float32, sum of exp(logit - largest) * (logit - largest)
    target: jax.Array  # float32, logit of the target
    best: jax.Array  # int32, the first id with the largest logit

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> _Sums:
        zeros = jnp.zeros(shape, jnp.float32)
        return cls(zeros + NOTHING, zeros, zeros, zeros, jnp.zeros(shape, jnp.int32))

    def add(self, logits_CV: jax.Array, is_target_CV: jax.Array, ids_V: jax.Array) -> _Sums:
        """The sums after a block; `ids_V`: -1 where the logits are NOTHING."""
        here_C = jnp.max(logits_CV, axis=-1)
        first_C = jnp.min(jnp.where(logits_CV == here_C[:, None], ids_V, jnp.iinfo(jnp.int32).max), axis=-1)
        largest_C = jnp.maximum(self.largest, here_C)
        drop_C, below_CV = self.largest - largest_C, logits_CV - largest_C[:, None]
        exps_CV, keep_C = jnp.exp(below_CV), jnp.exp(drop_C)
        best_C = jnp.where(here_C == self.largest, jnp.minimum(first_C, self.best), self.best)
        return _Sums(
            largest_C,
            keep_C * self.total + jnp.sum(exps_CV, axis=-1),
            keep_C * (self.weighted + drop_C * self.total) + jnp.sum(exps_CV * below_CV, axis=-1),
            self.target + jnp.sum(jnp.where(is_target_CV, logits_CV, 0.0), axis=-1),
            jnp.where(here_C > self.largest, first_C, best_C),
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def logprobs_in_blocks(
    how: BlockedOutput,
    shard: jax.Array,
    hidden_KCD: jax.Array,
    temperature_KC: jax.Array,
    targets_KC: jax.Array,
    mask_KC: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of each kept target, entropy of its distribution, and whether the target is its argmax.

    Chunks without a kept token cost nothing. Differentiable in the shard, the hidden states and the temperature; the
    shard's gradient is summed over devices in float32.

    Args:
        shard: a device's shard of the output matrix [D, V], or if tied of the table of embeddings [V, D].
        hidden_KCD: in the compute dtype.
        temperature_KC: float32, > 0 where kept.
        targets_KC: int32, anything where not kept.
        mask_KC: bool, True = keep.

    Returns:
        float32, float32 and bool [K, C]; 0 and False where not kept.
    """
    return _forward(how, shard, hidden_KCD, temperature_KC, targets_KC, mask_KC)[0]


def _forward(how, shard, hidden_KCD, temperature_KC, targets_KC, mask_KC):
    temperature_KC = jnp.where(mask_KC, temperature_KC, 1.0)
    chunks = hidden_KCD, temperature_KC, targets_KC, mask_KC

    def of_block(sums, index):
        block = how.blocks.gather(shard, index, hidden_KCD.dtype)

        def of_chunk(inputs):
            sums, *chunk = inputs
            return _if_kept(chunk[-1], lambda: sums.add(*_logits(how, block, index, *chunk[:-1])), lambda: sums)

        return _map(of_chunk, (sums, *chunks)), None

    sums, _ = how.blocks.scan(of_block, _Sums.empty(mask_KC.shape))
    total_KC = jnp.where(mask_KC, sums.total, 1.0)
    lse_KC = sums.largest + jnp.log(total_KC)
    entropy_KC = jnp.where(mask_KC, jnp.log(total_KC) - sums.weighted / total_KC, 0.0)
    found = jnp.where(mask_KC, sums.target - lse_KC, 0.0), entropy_KC, mask_KC & (sums.best == targets_KC)
    return found, (shard, *chunks, lse_KC, entropy_KC)


def _backward(how, saved, grads):
    shard, *chunks, lse_KC, entropy_KC = saved
    hidden_KCD, temperature_KC, targets_KC, mask_KC = chunks
    grad_logprob_KC, grad_entropy_KC, _ = grads
    inputs = hidden_KCD, temperature_KC, targets_KC, lse_KC, entropy_KC, grad_logprob_KC, grad_entropy_KC, mask_KC

    def of_block(carry, index):
        block = how.blocks.gather(shard, index, hidden_KCD.dtype)

        def of_chunk(grad_block, chunk):
            *done, hidden_CD, temperature_C, targets_C, lse_C, entropy_C, grad_logprob_C, grad_entropy_C, mask_C = chunk

            def add():
                logits_CV, is_target_CV, _ = _logits(how, block, index, hidden_CD, temperature_C, targets_C)
                log_CV = logits_CV - lse_C[:, None]
                probs_CV = jnp.exp(log_CV)
                grad_CV = grad_logprob_C[:, None] * (is_target_CV - probs_CV)
                grad_CV -= grad_entropy_C[:, None] * probs_CV * (log_CV + entropy_C[:, None])
                along_C = jnp.sum(grad_CV * logits_CV, axis=-1)
                grad_CV = jnp.where(mask_C, 1 / temperature_C, 0.0)[:, None] * grad_CV
                added, grad_hidden_CD = how.add_gradients(grad_block, grad_CV, hidden_CD, block)
                return added, (done[0] + grad_hidden_CD, done[1] - along_C / temperature_C)

            return _if_kept(mask_C, add, lambda: (grad_block, tuple(done)))

        grad_block, carry = _scan(of_chunk, jnp.zeros(block.shape, jnp.float32), (*carry, *inputs))
        return carry, how.blocks.scatter(grad_block)

    start = jnp.zeros(hidden_KCD.shape, jnp.float32), jnp.zeros(mask_KC.shape, jnp.float32)
    (grad_hidden_KCD, grad_temperature_KC), grad_shards = how.blocks.scan(of_block, start)
    grad_shard = how.blocks.join(grad_shards).astype(shard.dtype)
    grad_temperature_KC = jnp.where(mask_KC, grad_temperature_KC, 0.0)
    return grad_shard, grad_hidden_KCD.astype(hidden_KCD.dtype), grad_temperature_KC, None, None


logprobs_in_blocks.defvjp(_forward, _backward)


def _logits(how, block, index, hidden_CD, temperature_C, targets_C):
    """Logits [C, V] of a chunk and a block, whether each is the target's, and the ids [V] of the block."""
    logits_CV = how.logits(hidden_CD, block) / temperature_C[:, None]
    ids_V = how.blocks.ids(index)
    if not how.blocks.is_even:
        logits_CV = jnp.where(ids_V >= 0, logits_CV, NOTHING)
    position_C = how.blocks.positions(targets_C, index)
    return logits_CV, lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) == position_C[:, None], ids_V


def _if_kept(mask_C: jax.Array, compute: Any, skip: Any) -> Any:
    return lax.cond(jnp.any(mask_C), compute, skip)


def _map(function: Any, inputs: Any) -> Any:
    return _scan(lambda _, chunk: (None, function(chunk)), None, inputs)[1]


def _scan(function: Any, start: Any, inputs: Any) -> Any:
    """`lax.scan` over chunks; one chunk alone is no loop."""
    if len(inputs[-1]) > 1:
        return lax.scan(function, start, inputs)
    end, found = function(start, jax.tree.map(lambda x: x[0], inputs))
    return end, jax.tree.map(lambda x: x[None], found)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)

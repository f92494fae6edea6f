"""Losses over the vocabulary, a chunk of tokens at a time: [B, L, V] never exists.

Shape suffixes: B rows, L tokens, D width, V vocabulary, C tokens of a chunk, K chunks.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from r3rag_jax.models.matmul import transpose_copy
from r3rag_jax.parallel.blocks import Blocks
from r3rag_jax.parallel.collectives import (
    Dims,
    gather,
    join_over_tensor,
    scatter,
    split_over_tensor,
    sum_over_tensor,
)
from r3rag_jax.parallel.target import Target
from r3rag_jax.rl.vocabulary_blocks import BlockedOutput, logprobs_in_blocks
from r3rag_jax.sampler.distribution import WHOLE, Truncation, truncate


def chunked_logprobs(
    hidden_BLD: jax.Array,
    weight: jax.Array,
    targets_BL: jax.Array,
    temperature_BL: jax.Array,
    mask_BL: jax.Array,
    *,
    chunk: int,
    tied: bool = False,
    truncation: Truncation = WHOLE,
    target: Target,
    split: Dims = (),
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each kept target and entropy of its distribution, at the given temperatures.

    p_t = softmax(truncate(hidden_t weight, temperature_t, truncation)). The logits exist for at most `chunk` tokens
    at a time, in float32, and are recomputed in the backward pass. Tokens that are not kept cost nothing, except those
    that fill up the last chunk with kept ones.

    Args:
        hidden_BLD: float [B, L, D], final hidden states.
        weight: float [D, V], output projection; with `tied`, the table of embeddings [V, D]. (A loop stores what it
            closes over: a table that is transposed before the loop would be copied.)
        targets_BL: int [B, L], ids in [0, V); anything where not kept.
        temperature_BL: float [B, L], > 0.
        mask_BL: bool [B, L], True = keep.
        chunk: the most tokens whose logits exist at once on a device; at least one token of each row is in a chunk.
        tied: whether `weight` is a table of embeddings.
        truncation: what the tokens were sampled with.
        target: the devices that this is compiled for. On a device's shard the rows are those of the device.
        split: the dimensions of `weight` that devices have shards of; empty if it is whole. A split weight is gathered,
            and its gradient summed over devices, a block of the vocabulary after the other (`vocabulary_blocks.py`);
            with a truncation, whose threshold depends on all logits, in one. Loops over chunks have no collectives.

    Returns:
        logprobs_BL and entropy_BL in nats, float32 [B, L], 0 where not kept, differentiable in
        hidden, weight and temperature.

    Raises:
        ValueError: chunk is not positive.
    """
    if split and truncation == WHOLE:
        return _in_blocks(weight, hidden_BLD, temperature_BL, targets_BL, mask_BL, chunk, tied, target, split)[:2]
    chunks = _Chunks(mask_BL.astype(bool), chunk, target)
    inputs = map(chunks.split, (hidden_BLD, temperature_BL, targets_BL))
    found_K2C = _logprobs(_How(tied, target, split, truncation), weight, *inputs, chunks.mask_KC, chunks.any_K)
    return chunks.join(found_K2C[:, 0]), chunks.join(found_K2C[:, 1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(how, weight, hidden_KCD, temperature_KC, targets_KC, mask_KC, any_K):
    """Log-probabilities and entropies, float32 [K, 2, C]."""
    weight = how.whole(weight, hidden_KCD.dtype)

    def if_kept(inputs):
        hidden_CD, *rest, any_kept = inputs
        skip = jnp.zeros((2, len(hidden_CD)), jnp.float32)
        return _if_kept(
            how.target, any_kept, lambda: _of_logits(how, how.logits(hidden_CD, weight), *rest), lambda: skip
        )

    return lax.map(if_kept, (hidden_KCD, temperature_KC, targets_KC, mask_KC, any_K))


def _of_logits(how, logits_CV, temperature_C, targets_C, mask_C):
    temperature_C = jnp.where(mask_C, temperature_C.astype(jnp.float32), 1.0)
    can_branch = how.target.can_branch
    logits_CV = truncate(logits_CV, temperature_C, how.truncation, targets_C, can_branch=can_branch)
    lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
    all_CV = jnp.where(jnp.isfinite(logits_CV), logits_CV - lse_C[:, None], 0.0)
    entropy_C = -jnp.sum(jnp.exp(logits_CV - lse_C[:, None]) * all_CV, axis=-1)
    return jnp.where(mask_C, jnp.stack([_target_logits(logits_CV, targets_C) - lse_C, entropy_C]), 0.0)


def _logprobs_forward(how, *inputs):
    return _logprobs(how, *inputs), inputs


def _logprobs_backward(how, inputs, grad_K2C):
    weight, hidden_KCD, temperature_KC, targets_KC, mask_KC, any_K = inputs
    whole = how.whole(weight, hidden_KCD.dtype)

    def one_chunk(grad_weight, hidden_CD, temperature_C, targets_C, mask_C, grad_2C):
        def of_logits(logits_CV, temperature_C):
            return _of_logits(how, logits_CV, temperature_C, targets_C, mask_C)

        _, pull = jax.vjp(of_logits, how.logits(hidden_CD, whole), temperature_C)
        grad_CV, grad_temperature_C = pull(grad_2C)
        grad_weight, grad_hidden_CD = how.add_gradients(grad_weight, grad_CV, hidden_CD, whole)
        return grad_weight, (grad_hidden_CD, grad_temperature_C)

    def if_kept(grad_weight, inputs):
        *chunk, any_kept = inputs
        skip = grad_weight, (jnp.zeros_like(chunk[0]), jnp.zeros_like(chunk[1]))
        return _if_kept(how.target, any_kept, lambda: one_chunk(grad_weight, *chunk), lambda: skip)

    start, chunks = jnp.zeros(whole.shape, jnp.float32), (hidden_KCD, temperature_KC, targets_KC, mask_KC, grad_K2C)
    grad_weight, (grad_hidden_KCD, grad_temperature_KC) = lax.scan(if_kept, start, (*chunks, any_K))
    grads = how.shard(grad_weight, weight.dtype), grad_hidden_KCD
    return *(lax.optimization_barrier(grads) if how.split else grads), grad_temperature_KC, None, None, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def cross_entropy(
    hidden_BLD: jax.Array,
    weight: jax.Array,
    targets_BL: jax.Array,
    mask_BL: jax.Array,
    *,
    chunk: int,
    tied: bool = False,
    target: Target,
    split: Dims = (),
    share: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Token-mean cross-entropy whose gradient is formed chunk by chunk in the forward pass.

    While the logits of a chunk exist, so does d loss / d logits = (softmax - onehot) / count: the gradients of hidden
    and weight are computed from it at once, and the logits are neither stored nor recomputed.
    Without differentiation only the loss is computed. Gradients of the weight are summed in
    float32. Tokens that are not kept cost nothing, except those that fill up the last chunk with kept ones.

    Args:
        hidden_BLD: float [B, L, D], final hidden states.
        weight: float [D, V], output projection; with `tied`, the table of embeddings [V, D]. (A loop stores what it
            closes over: a table that is transposed before the loop would be copied.)
        targets_BL: int [B, L], ids in [0, V); anything where not kept.
        mask_BL: bool [B, L], True = keep.
        chunk: the most tokens whose logits exist at once on a device; at least one token of each row is in a chunk.
        tied: whether `weight` is a table of embeddings.
        target, split: as of `chunked_logprobs`. In blocks the logits are computed again in the backward pass, since no
            token's softmax is known before the last block.
        share: the weight of these rows' means in those of the whole batch.

    Returns:
        (loss, accuracy), float32 scalars: mean nats per kept token, and the share of kept tokens
        whose target is the argmax (no gradient), each times `share`. Both are 0 when nothing is kept.

    Raises:
        ValueError: chunk is not positive.
    """
    scale = share / jnp.maximum(jnp.sum(mask_BL, dtype=jnp.float32), 1.0)
    if split:
        ones = jnp.ones(mask_BL.shape, jnp.float32)
        logprobs, _, right = _in_blocks(weight, hidden_BLD, ones, targets_BL, mask_BL, chunk, tied, target, split)
        return -jnp.sum(logprobs) * scale, jnp.sum(right) * scale
    chunks = _Chunks(mask_BL.astype(bool), chunk, target)
    inputs = chunks.split(hidden_BLD), chunks.split(targets_BL), chunks.mask_KC, chunks.any_K
    return _cross_entropy(_How(tied, target), weight, *inputs, scale)


def _in_blocks(
    weight: jax.Array,
    hidden_BLD: jax.Array,
    temperature_BL: jax.Array,
    targets_BL: jax.Array,
    mask_BL: jax.Array,
    chunk: int,
    tied: bool,
    target: Target,
    split: Dims,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities, entropies and whether the target is the argmax (1.0 or 0.0), float32 [B, L]."""
    blocks = Blocks.of(weight.shape, 0 if tied else 1, split, target)
    # A chunk's part of the logits is smaller, and a gradient in float32 is read and written once a chunk.
    chunks = _Chunks(mask_BL.astype(bool), min(2, blocks.num) * chunk, target)
    inputs = chunks.split(hidden_BLD), chunks.split(temperature_BL.astype(jnp.float32)), chunks.split(targets_BL)
    found = logprobs_in_blocks(BlockedOutput(tied, target, blocks), weight, *inputs, chunks.mask_KC)
    logprobs, entropy, right = (chunks.join(x.astype(jnp.float32)) for x in found)
    return logprobs, entropy, right


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(how, weight, hidden_KCD, targets_KC, mask_KC, any_K, scale):
    def one_chunk(hidden_CD, targets_C, mask_C):
        return _chunk_sums(how.logits(hidden_CD, weight), targets_C, mask_C)[0]

    def if_kept(sums, inputs):
        *chunk, any_kept = inputs
        return _if_kept(how.target, any_kept, lambda: sums + one_chunk(*chunk), lambda: sums), None

    sums, _ = lax.scan(if_kept, jnp.zeros(2, jnp.float32), (hidden_KCD, targets_KC, mask_KC, any_K))
    loss, accuracy = sum_over_tensor(sums, how.target) * scale
    return loss, accuracy


def _cross_entropy_forward(how, weight, hidden_KCD, targets_KC, mask_KC, any_K, scale):
    def one_chunk(carry, hidden_CD, targets_C, mask_C):
        sums, grad_weight = carry
        chunk_sums, exps_CV, total_C = _chunk_sums(how.logits(hidden_CD, weight), targets_C, mask_C)
        grad_CV = exps_CV.at[jnp.arange(len(targets_C)), targets_C].add(-total_C, mode="drop")
        grad_CV = grad_CV * jnp.where(mask_C, scale / total_C, 0.0)[:, None]
        grad_weight, grad_hidden_CD = how.add_gradients(grad_weight, grad_CV, hidden_CD, weight)
        return (sums + chunk_sums, grad_weight), grad_hidden_CD

    def if_kept(carry, inputs):
        *chunk, any_kept = inputs
        skip = jnp.zeros_like(chunk[0])
        return _if_kept(how.target, any_kept, lambda: one_chunk(carry, *chunk), lambda: (carry, skip))

    start = jnp.zeros(2, jnp.float32), jnp.zeros(weight.shape, jnp.float32)
    (sums, grad_weight), grad_hidden_KCD = lax.scan(if_kept, start, (hidden_KCD, targets_KC, mask_KC, any_K))
    loss, accuracy = sum_over_tensor(sums, how.target) * scale
    return (loss, accuracy), (grad_weight.astype(weight.dtype), grad_hidden_KCD)


def _cross_entropy_backward(how, grads, cotangents):
    cotangent, _ = cotangents  # the accuracy is piecewise constant
    grad_weight, grad_hidden_KCD = ((cotangent * g).astype(g.dtype) for g in grads)
    return grad_weight, grad_hidden_KCD, None, None, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _chunk_sums(logits_CV, targets_C, mask_C):
    """Return ([sum of nats, number right] over the kept tokens, exp(logits - the largest of a token), their sums)."""
    largest_C = jnp.max(logits_CV, axis=-1)
    exps_CV = lax.optimization_barrier(jnp.exp(logits_CV - largest_C[:, None]))  # computed once for all uses
    total_C = jnp.sum(exps_CV, axis=-1)
    target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1, mode="clip")[:, 0]
    nats_C = largest_C + jnp.log(total_C) - target_C
    # Right is the first of the largest, as argmax has it, for which XLA's CPU backend takes ten times as long.
    is_before_CV = lax.broadcasted_iota(targets_C.dtype, logits_CV.shape, 1) < targets_C[:, None]
    right_C = (target_C == largest_C) & ~jnp.any((logits_CV == largest_C[:, None]) & is_before_CV, axis=-1)
    sums_2C = jnp.where(mask_C, jnp.stack([nats_C, right_C.astype(jnp.float32)]), 0.0)
    return jnp.sum(sums_2C, axis=1), exps_CV, total_C


class _How(NamedTuple):
    """How the output projection is stored and used; static."""

    tied: bool
    target: Target
    split: Dims = ()
    truncation: Truncation = WHOLE

    def whole(self, weight, dtype):
        """The weight before a loop, gathered where it is split."""
        return gather(weight, self.split, dtype, weight.dtype)

    def shard(self, grad_weight, dtype):
        """The gradient after a loop, which has summed it in float32: this device's shard of the sum over all."""
        return scatter(grad_weight, self.split).astype(dtype)

    def logits(self, hidden_CD, weight):
        return _dot(hidden_CD, transpose_copy(weight, self.target) if self.tied else weight)

    def add_gradients(self, grad_weight, grad_CV, hidden_CD, weight):
        """Add a chunk to the gradient of the weight; returns it and the gradient of the chunk's hidden states."""
        grad_CV = grad_CV.astype(weight.dtype)
        left, right = (grad_CV, hidden_CD) if self.tied else (hidden_CD, grad_CV)
        grad_weight = grad_weight + _dot(transpose_copy(left, self.target), right)
        grad_hidden_CD = _dot(grad_CV, weight if self.tied else transpose_copy(weight, self.target))
        return grad_weight, grad_hidden_CD.astype(hidden_CD.dtype)


def _dot(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _target_logits(logits_CV, targets_C):
    # A compare-and-sum, not a gather: its gradient is then a select, not a scatter.
    is_target_CV = lax.broadcasted_iota(targets_C.dtype, logits_CV.shape, 1) == targets_C[:, None]
    return jnp.sum(jnp.where(is_target_CV, logits_CV, 0.0), axis=-1)


def _if_kept(target, any_kept, compute, skip):
    """compute(), or skip() where no token of the chunk is kept and the target may branch."""
    return lax.cond(any_kept, compute, skip) if target.can_branch else compute()


class _Chunks:
    """Rows of tokens, sorted by whether they are kept, cut into K chunks of C tokens: some columns of all rows each.

    Rows are neither cut nor reordered; the last chunks have no kept token. If the target cannot branch there is only
    one chunk. On a device's shard each device of the tensor axis has other columns of the device's rows.
    """

    def __init__(self, mask_BL: jax.Array, chunk: int, target: Target):
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 token; got {chunk}")
        self._target, self._shape = target, mask_BL.shape
        B, L = mask_BL.shape[0], -(-mask_BL.shape[1] // target.ways("tensor"))  # the most columns that a device has
        self._columns = min(L, max(1, chunk // B)) if target.can_branch else L
        self._num_chunks = -(-L // self._columns)
        self._order_BL = jnp.argsort(~mask_BL, axis=1, stable=True)
        self._inverse_BL = jnp.argsort(self._order_BL, axis=1)
        self.mask_KC = self.split(mask_BL)
        self.any_K = jnp.any(self.mask_KC, axis=1)

    def split(self, x_BL: jax.Array) -> jax.Array:
        """[B, L, ...] -> [K, C, ...], padded with zeros."""
        x_BL = _permute(x_BL, self._order_BL, self._inverse_BL)
        (B, L), K, columns = self._shape, self._num_chunks, self._columns
        width = K * columns * self._target.ways("tensor")
        x_BL = jnp.pad(x_BL, [(0, 0), (0, width - L)] + [(0, 0)] * (x_BL.ndim - 2))
        x_BL = split_over_tensor(x_BL, self._target)
        return jnp.moveaxis(x_BL.reshape(B, K, columns, *x_BL.shape[2:]), 1, 0).reshape(K, B * columns, *x_BL.shape[2:])

    def join(self, x_KC: jax.Array) -> jax.Array:
        """Undo `split`."""
        (B, L), K, columns = self._shape, self._num_chunks, self._columns
        x_BL = jnp.moveaxis(x_KC.reshape(K, B, columns), 0, 1).reshape(B, K * columns)
        x_BL = join_over_tensor(x_BL, self._target)[:, :L]
        return _permute(x_BL, self._inverse_BL, self._order_BL)


@jax.custom_vjp
def _permute(x_BL, order_BL, inverse_BL):
    """The tokens of each row in a given order. Its gradient is a gather by the inverse, where XLA would scatter."""
    return _permute_forward(x_BL, order_BL, inverse_BL)[0]


def _permute_forward(x_BL, order_BL, inverse_BL):
    index = order_BL.reshape(order_BL.shape + (1,) * (x_BL.ndim - 2))
    return jnp.take_along_axis(x_BL, index, axis=1), (order_BL, inverse_BL)


def _permute_backward(orders, grad_BL):
    return _permute_forward(grad_BL, *orders[::-1])[0], None, None


_permute.defvjp(_permute_forward, _permute_backward)

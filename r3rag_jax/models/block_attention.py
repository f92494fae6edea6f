"""Causal attention in blocks of tokens, without the pairs of blocks in which no query sees a key.

    for each row: for each block of queries: for each block of keys that one of them sees: scores, running softmax

That is FlashAttention-2 (arXiv 2307.08691) with a list of blocks for each row. Trajectories that share a row, and
branches of a prefix tree, see little of the row, and the rest costs nothing. How often the inner loop turns depends
on the batch, which suits CPUs; accelerators have kernels.

Shapes: B rows, L tokens, N query heads, K kv heads (N = K * G), H head dim; n blocks of a row, C tokens of a block,
R = G * C queries of a kv head in a block, by query head and then by token.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from r3rag_jax.models.matmul import transpose_copy
from r3rag_jax.models.visibility import Tokens
from r3rag_jax.parallel.target import Target

MAX_BLOCK = 128  # tokens
MASKED = -1e30  # a score that does not count; finite, since a whole block of them may come first
SAVED = "attention"  # `checkpoint_name` of what is saved besides q, k and v


class Seen(NamedTuple):
    """The blocks of keys that each block of queries sees."""

    blocks_Bnn: jax.Array  # int32, those that are seen first
    counts_Bn: jax.Array  # int32, how many are seen


def block_attention(
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    segment_ids_BL: jax.Array | None,
    branch_ids_BL: jax.Array | None,
    target: Target,
) -> jax.Array:
    """Attention of whole rows, or of a device's shard of them; arguments and result as of `attention.attention`."""
    B, L = q_BLNH.shape[:2]
    num_blocks = -(-L // MAX_BLOCK)
    block = -(-L // num_blocks)
    missing = num_blocks * block - L  # causality keeps the padding invisible to tokens

    def padded(x_BL: jax.Array) -> jax.Array:
        return jnp.pad(x_BL, ((0, 0), (0, missing)) + ((0, 0),) * (x_BL.ndim - 2))

    position = jnp.broadcast_to(jnp.arange(L + missing, dtype=jnp.int32), (B, L + missing))
    tokens = Tokens(position, *jax.tree.map(padded, (segment_ids_BL, branch_ids_BL)))
    tokens_BnC = jax.tree.map(lambda x: x.reshape(B, num_blocks, block), tokens)
    return _attend(target, padded(q_BLNH), padded(k_BLKH), padded(v_BLKH), tokens_BnC)[:, :L]


def seen_blocks(tokens_BnC: Tokens) -> Seen:
    """Which blocks of keys hold one that a query of each block sees."""
    queries_BnC11 = jax.tree.map(lambda x: x[..., None, None], tokens_BnC)
    keys_B11nC = jax.tree.map(lambda x: x[:, None, None], tokens_BnC)
    is_seen_Bnn = jnp.any(queries_BnC11.see(keys_B11nC), axis=(2, 4))
    blocks_Bnn = jnp.argsort(~is_seen_Bnn, axis=-1, stable=True).astype(jnp.int32)
    return Seen(blocks_Bnn, jnp.sum(is_seen_Bnn, axis=-1, dtype=jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(target: Target, q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, tokens_BnC: Tokens) -> jax.Array:
    return _forward(target, q_BLNH, k_BLKH, v_BLKH, tokens_BnC)[0]


def _forward(
    target: Target, q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, tokens_BnC: Tokens
) -> tuple[jax.Array, Any]:
    seen, n, K = seen_blocks(tokens_BnC), tokens_BnC.position.shape[1], k_BLKH.shape[2]
    k_BnKHC, v_BnKCH = transpose_copy(_keys(k_BLKH, n), target), _keys(v_BLKH, n)
    inputs = _queries(_scaled(q_BLNH), n, K), k_BnKHC, v_BnKCH, tokens_BnC, seen
    out_BnKRH, lse_BnKR = lax.map(lambda row: _row_forward(*row), inputs)
    out = checkpoint_name(_by_token(out_BnKRH, q_BLNH), SAVED)
    lse = checkpoint_name(lse_BnKR, SAVED)
    return out, (q_BLNH, k_BLKH, v_BLKH, tokens_BnC, seen, out, lse)


def _backward(target: Target, saved: Any, grad_BLNH: jax.Array) -> tuple[Any, ...]:
    q_BLNH, k_BLKH, v_BLKH, tokens_BnC, seen, out_BLNH, lse_BnKR = saved
    n, K = tokens_BnC.position.shape[1], k_BLKH.shape[2]
    # The sum over keys of grad_weights * weights equals the sum over H of grad * out.
    inner = jnp.sum(grad_BLNH.astype(jnp.float32) * out_BLNH.astype(jnp.float32), axis=-1, keepdims=True)
    inner_BnKR = _queries(inner, n, K)[..., 0]
    k_BnKCH = _keys(k_BLKH, n)
    of_keys = k_BnKCH, transpose_copy(k_BnKCH, target), transpose_copy(_keys(v_BLKH, n), target)
    q_BnKRH, grad_BnKRH = _queries(_scaled(q_BLNH), n, K), _queries(grad_BLNH, n, K)
    of_queries = (x for y in (q_BnKRH, grad_BnKRH) for x in (y, transpose_copy(y, target)))
    inputs = *of_keys, *of_queries, inner_BnKR, lse_BnKR, tokens_BnC, seen
    grad_q_BnKRH, *grads_BnKHC = lax.map(lambda row: _row_backward(*row), inputs)
    grad_k, grad_v = (g.transpose(0, 1, 4, 2, 3).reshape(k_BLKH.shape).astype(k_BLKH.dtype) for g in grads_BnKHC)
    return _scaled(_by_token(grad_q_BnKRH, q_BLNH)), grad_k, grad_v, None


_attend.defvjp(_forward, _backward)


def _row_forward(
    q_nKRH: jax.Array, k_nKHC: jax.Array, v_nKCH: jax.Array, tokens_nC: Tokens, seen: Seen
) -> tuple[jax.Array, jax.Array]:
    """Output [n, K, R, H] and log-sum-exp [n, K, R] of a row, float32."""

    def of_queries(inputs: Any) -> tuple[jax.Array, jax.Array]:
        q_KRH, queries_C, blocks_n, count = inputs

        def add(turn: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            largest_KR, total_KR, out_KRH = sums
            k_KHC, v_KCH, keys_C = _at((k_nKHC, v_nKCH, tokens_nC), blocks_n[turn])
            scores_KRC = jnp.where(_mask(queries_C, keys_C, q_KRH), _matmul(q_KRH, k_KHC), MASKED)
            now_KR = jnp.maximum(largest_KR, jnp.max(scores_KRC, axis=-1))
            weights_KRC, keep_KR = jnp.exp(scores_KRC - now_KR[..., None]), jnp.exp(largest_KR - now_KR)
            added_KRH = _matmul(weights_KRC.astype(v_KCH.dtype), v_KCH)
            total_KR = total_KR * keep_KR + jnp.sum(weights_KRC, axis=-1)
            return now_KR, total_KR, out_KRH * keep_KR[..., None] + added_KRH

        zeros = jnp.zeros_like(q_KRH, jnp.float32)
        start = zeros[..., 0] + MASKED, zeros[..., 0], zeros
        largest_KR, total_KR, out_KRH = lax.fori_loop(0, count, add, start)
        return out_KRH / total_KR[..., None], largest_KR + jnp.log(total_KR)

    return lax.map(of_queries, (q_nKRH, tokens_nC, *seen))


def _row_backward(
    k_nKCH: jax.Array,
    k_nKHC: jax.Array,
    v_nKHC: jax.Array,
    q_nKRH: jax.Array,
    q_nKHR: jax.Array,
    grad_nKRH: jax.Array,
    grad_nKHR: jax.Array,
    inner_nKR: jax.Array,
    lse_nKR: jax.Array,
    tokens_nC: Tokens,
    seen: Seen,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of a row's scaled queries [n, K, R, H], and of keys and values [n, K, H, C]; float32.

    Every factor is transposed once a row, none in the loop.
    """

    def of_queries(grads: tuple[jax.Array, jax.Array], inputs: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        q_KRH, q_KHR, grad_KRH, grad_KHR, inner_KR, lse_KR, queries_C, blocks_n, count = inputs

        def add(turn: jax.Array, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            grad_q_KRH, grad_k_nKHC, grad_v_nKHC = grads
            block = blocks_n[turn]
            k_KCH, k_KHC, v_KHC, keys_C = _at((k_nKCH, k_nKHC, v_nKHC, tokens_nC), block)
            scores_KRC, grad_weights_KRC = _matmul(q_KRH, k_KHC), _matmul(grad_KRH, v_KHC)
            weights_KRC = jnp.where(_mask(queries_C, keys_C, q_KRH), jnp.exp(scores_KRC - lse_KR[..., None]), 0.0)
            grad_scores_KRC = (weights_KRC * (grad_weights_KRC - inner_KR[..., None])).astype(q_KRH.dtype)
            return (
                grad_q_KRH + _matmul(grad_scores_KRC, k_KCH),
                grad_k_nKHC.at[block].add(_matmul(q_KHR, grad_scores_KRC)),
                grad_v_nKHC.at[block].add(_matmul(grad_KHR, weights_KRC.astype(grad_KHR.dtype))),
            )

        grad_q_KRH, *grads_nKHC = lax.fori_loop(0, count, add, (jnp.zeros_like(q_KRH, jnp.float32), *grads))
        return tuple(grads_nKHC), grad_q_KRH

    start = jnp.zeros_like(k_nKHC, jnp.float32), jnp.zeros_like(v_nKHC, jnp.float32)
    inputs = q_nKRH, q_nKHR, grad_nKRH, grad_nKHR, inner_nKR, lse_nKR, tokens_nC, *seen
    grads_nKHC, grad_q_nKRH = lax.scan(of_queries, start, inputs)
    return grad_q_nKRH, *grads_nKHC


def _at(tree: Any, block: jax.Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, block, keepdims=False), tree)


def _mask(queries_C: Tokens, keys_C: Tokens, q_KRH: jax.Array) -> jax.Array:
    """Which of the R queries see which keys, bool [R, C]."""
    is_seen_CC = jax.tree.map(lambda x: x[:, None], queries_C).see(keys_C)
    return jnp.tile(is_seen_CC, (q_KRH.shape[1] // len(is_seen_CC), 1))


def _scaled(q: jax.Array) -> jax.Array:
    """Scaled in float32: 128**-0.5 rounded to bfloat16 would bias every score."""
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _queries(q_BLNH: jax.Array, n: int, K: int) -> jax.Array:
    """[B, L, N, H] -> [B, n, K, R, H]."""
    B, L, N, H = q_BLNH.shape
    x = q_BLNH.reshape(B, n, L // n, K, N // K, H).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(B, n, K, -1, H)


def _keys(k_BLKH: jax.Array, n: int) -> jax.Array:
    """[B, L, K, H] -> [B, n, K, C, H]."""
    B, L, K, H = k_BLKH.shape
    return jnp.swapaxes(k_BLKH.reshape(B, n, L // n, K, H), 2, 3)


def _by_token(x_BnKRH: jax.Array, like_BLNH: jax.Array) -> jax.Array:
    """Undo `_queries`, in the dtype of `like_BLNH`."""
    B, L, N, H = like_BLNH.shape
    n, K = x_BnKRH.shape[1:3]
    x = x_BnKRH.reshape(B, n, K, N // K, L // n, H).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(like_BLNH.shape).astype(like_BLNH.dtype)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)

"""Causal grouped-query attention over whole sequences, for training; several implementations, chosen by name.

Shapes: B rows, L tokens, N query heads, K kv heads (N = K * G), H head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from r3rag_jax.errors import UserError
from r3rag_jax.models.block_attention import SAVED, block_attention
from r3rag_jax.models.matmul import transpose_copy
from r3rag_jax.models.visibility import Tokens
from r3rag_jax.parallel.target import ONE_CPU, Target

IMPLEMENTATIONS = ("xla", "blocks", "cudnn", "splash")
PLATFORMS = {"cudnn": ("gpu",), "splash": ("tpu", "cpu")}  # the others run on any platform
QUERY_CHUNK = 128  # queries that "xla" attends from at a time
LANES, MAX_BLOCK = 128, 512  # a block of "splash" is a multiple of LANES and at most MAX_BLOCK, in tokens


def attention(
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    segment_ids_BL: jax.Array | None = None,
    branch_ids_BL: jax.Array | None = None,
    *,
    implementation: str = "xla",
    target: Target = ONE_CPU,
) -> jax.Array:
    """Causal attention within segments and branches; returns [B, L, N, H].

    out[i] = sum_j softmax_j(q[i] . k[j] / sqrt(H)) v[j], where j runs over the tokens that i sees (arXiv 1706.03762).

    For the output and for each of the gradients of q, k and v, the relative L2 difference of any implementation to
    "xla" is at most 1e-2 in bfloat16 and 2e-6 in float32 (with full-precision matmuls). On several devices each
    attends within its rows and heads (`Target.shard`).

    Args:
        q_BLNH: queries. k_BLKH, v_BLKH: keys and values; query head n reads kv head n // G.
        segment_ids_BL: int32; token i sees token j only if j <= i and their ids are equal. Padding has id 0. Every
            token sees itself, so outputs of padding are finite. None: one segment.
        branch_ids_BL: int32; token i sees token j only if j's branch is 0 or equals i's (`training/prefix_tree.py`).
            None: no branches.
        implementation: "xla" (any device), "blocks" (made for CPUs, not run elsewhere; the faster the less of its row a
            token sees), "cudnn" (NVIDIA; bfloat16 or float16; H a multiple of 8, at most 128, or 256 from Hopper on;
            an even L if there are segment ids) or "splash" (TPU; CPUs interpret the kernel, which is slow).
        target: the devices to compile for.

    Raises:
        ValueError: the implementation is unknown.
        UserError: the implementation does not run on these devices.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}; got {implementation!r}")
    if target.platform not in PLATFORMS.get(implementation, (target.platform,)):
        known = " or ".join(PLATFORMS[implementation])
        raise UserError(f"attention {implementation!r} must run on {known}; got {target.platform}")
    if implementation == "blocks":
        return block_attention(q_BLNH, k_BLKH, v_BLKH, segment_ids_BL, branch_ids_BL, target)
    if implementation == "splash":
        return _splash(q_BLNH, k_BLKH, v_BLKH, segment_ids_BL, branch_ids_BL, target)
    if implementation == "cudnn":
        has_ids = segment_ids_BL is not None or branch_ids_BL is not None
        mask = _visible(segment_ids_BL, branch_ids_BL, 0, q_BLNH.shape[1])[:, None] if has_ids else None
        return jax.nn.dot_product_attention(q_BLNH, k_BLKH, v_BLKH, mask=mask, is_causal=True, implementation="cudnn")
    return _chunked(target, q_BLNH, k_BLKH, v_BLKH, segment_ids_BL, branch_ids_BL)


def _visible(segment_ids_BL: jax.Array | None, branch_ids_BL: jax.Array | None, start: int, end: int) -> jax.Array:
    """Which keys 0 .. end queries start .. end see, bool [B, end - start, end]; B is 1 where all rows see alike."""
    tokens = Tokens(jnp.arange(end)[None], segment_ids_BL, branch_ids_BL)
    queries = jax.tree.map(lambda x: x[:, start:end, None], tokens)
    keys = jax.tree.map(lambda x: x[:, None, :end], tokens)
    return queries.see(keys)


def _splash(
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    segment_ids_BL: jax.Array | None,
    branch_ids_BL: jax.Array | None,
    target: Target,
) -> jax.Array:
    """Flash attention on one device (`jax.experimental.pallas.ops.tpu`); it skips blocks that are masked as a whole.

    Without branches these are the blocks above the diagonal, and the kernel compares segment ids. With branches, which
    its masks of ids cannot express, each row has a mask of its own, a byte for each pair of tokens: [L, L], built again
    in each layer. The kernel then also skips the blocks of other segments and branches.

    Rows are right-padded to a multiple of the block size. Causality keeps the padding invisible to tokens.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Pallas takes a while to import

    L, N, H = q_BLNH.shape[1:]
    num_blocks = -(-L // MAX_BLOCK)
    block = -(-L // (num_blocks * LANES)) * LANES
    missing = num_blocks * block - L

    def by_head(x_BLNH: jax.Array) -> jax.Array:
        return jnp.pad(jnp.swapaxes(x_BLNH, 1, 2), ((0, 0), (0, 0), (0, missing), (0, 0)))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, mask: Any) -> jax.Array:
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([splash.CausalMask((L + missing, L + missing))] * N) if mask is None else mask[None],
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dq=block,
                block_kv_dq=block,
                block_q_dkv=block,
                block_kv_dkv=block,
            ),
            head_shards=1,
            q_seq_shards=1,
            interpret=target.is_cpu,
        )
        if mask is not None:  # under jit the library has traced this flag, which it reads as a Python bool
            kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        return kernel(q, k, v, segments)

    # The kernel does not scale the scores. Scale in float32: 128**-0.5 rounded to bfloat16 would bias every score.
    q = (by_head(q_BLNH).astype(jnp.float32) * H**-0.5).astype(q_BLNH.dtype)
    ids, branches = (None if x is None else jnp.pad(x, ((0, 0), (0, missing))) for x in (segment_ids_BL, branch_ids_BL))
    segments = mask = None
    if branches is not None:
        mask = _visible(ids, branches, 0, L + missing)
    elif ids is not None:
        segments = splash.SegmentIds(q=ids, kv=ids)
    out_BNLH = jax.vmap(attend)(q, by_head(k_BLKH), by_head(v_BLKH), segments, mask)
    return jnp.swapaxes(out_BNLH, 1, 2)[:, :L]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    target: Target,
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    segment_ids_BL: jax.Array | None,
    branch_ids_BL: jax.Array | None,
) -> jax.Array:
    """Exact attention from QUERY_CHUNK queries at a time to the keys up to the last of these queries.

    Keys above the diagonal blocks are skipped. The forward pass saves the log-sum-exp of the scores instead of the
    weights, and the backward pass recomputes the weights from it (arXiv 2205.14135).
    """
    return _chunked_forward(target, q_BLNH, k_BLKH, v_BLKH, segment_ids_BL, branch_ids_BL)[0]


def _chunked_forward(
    target: Target,
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    segment_ids_BL: jax.Array | None,
    branch_ids_BL: jax.Array | None,
) -> tuple[jax.Array, Any]:
    q, k, v = _by_head(q_BLNH, k_BLKH.shape[2]), _by_head(k_BLKH), _by_head(v_BLKH)
    outs, lses = [], []
    for start, end in _query_chunks(q_BLNH):
        scores = _scores(q[..., start:end, :], k[:, :, :end], segment_ids_BL, branch_ids_BL, start, target)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        outs.append((_weighted(weights.astype(v.dtype), v[:, :, :end]) / total).astype(q.dtype))
        lses.append(largest + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, axis=3), SAVED)
    lse = checkpoint_name(jnp.concatenate(lses, axis=3), SAVED)
    return _by_token(out), (q_BLNH, k_BLKH, v_BLKH, segment_ids_BL, branch_ids_BL, out, lse)


def _chunked_backward(
    target: Target, saved: Any, grad_BLNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q_BLNH, k_BLKH, v_BLKH, segment_ids_BL, branch_ids_BL, out, lse = saved
    K = k_BLKH.shape[2]
    q, k, v, grad = _by_head(q_BLNH, K), _by_head(k_BLKH), _by_head(v_BLKH), _by_head(grad_BLNH, K)
    # The sum over keys of grad_weights * weights equals the sum over H of grad * out.
    inner = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    grad_qs, grad_k, grad_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for start, end in _query_chunks(q_BLNH):
        here = (..., slice(start, end), slice(None))
        scores = _scores(q[here], k[:, :, :end], segment_ids_BL, branch_ids_BL, start, target)
        weights = jnp.exp(scores - lse[here])
        grad_weights = _products(grad[here], v[:, :, :end], target)
        grad_scores = (weights * (grad_weights - inner[here]) * q.shape[-1] ** -0.5).astype(q.dtype)
        grad_v = grad_v.at[:, :, :end].add(_sum_over_queries(weights.astype(v.dtype), grad[here], target))
        grad_k = grad_k.at[:, :, :end].add(_sum_over_queries(grad_scores, q[here], target))
        grad_qs.append(_weighted(grad_scores, k[:, :, :end]))
    grad_q = _by_token(jnp.concatenate(grad_qs, axis=3)).astype(q_BLNH.dtype)
    grad_k, grad_v = (jnp.swapaxes(g, 1, 2).astype(k.dtype) for g in (grad_k, grad_v))
    return grad_q, grad_k, grad_v, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _query_chunks(q_BLNH: jax.Array) -> list[tuple[int, int]]:
    L = q_BLNH.shape[1]
    return [(start, min(start + QUERY_CHUNK, L)) for start in range(0, L, QUERY_CHUNK)]


def _by_head(x: jax.Array, num_kv_heads: int | None = None) -> jax.Array:
    """[B, L, K, H] -> [B, K, L, H]; with `num_kv_heads`, for queries, [B, L, N, H] -> [B, K, G, L, H]."""
    if num_kv_heads is None:
        return jnp.swapaxes(x, 1, 2)
    B, L, N, H = x.shape
    return x.reshape(B, L, num_kv_heads, N // num_kv_heads, H).transpose(0, 2, 3, 1, 4)


def _by_token(x_BKGLH: jax.Array) -> jax.Array:
    B, K, G, L, H = x_BKGLH.shape
    return x_BKGLH.transpose(0, 3, 1, 2, 4).reshape(B, L, K * G, H)


def _scores(
    q: jax.Array,
    k: jax.Array,
    segment_ids_BL: jax.Array | None,
    branch_ids_BL: jax.Array | None,
    start: int,
    target: Target,
) -> jax.Array:
    """Scaled scores of queries from `start` on, float32 [B, K, G, queries, keys]; -inf where a key is masked."""
    visible = _visible(segment_ids_BL, branch_ids_BL, start, k.shape[2])
    return jnp.where(visible[:, None, None], _products(q, k, target) * q.shape[-1] ** -0.5, -jnp.inf)


# The G query heads of a kv head form the rows of one matmul. XLA's CPU einsum over five axes is several times slower.


def _products(x: jax.Array, y: jax.Array, target: Target) -> jax.Array:
    """[B, K, G, q, H] with [B, K, m, H] -> [B, K, G, q, m]."""
    return _weighted(x, transpose_copy(y, target))


def _weighted(x: jax.Array, y: jax.Array) -> jax.Array:
    """[B, K, G, q, m] with [B, K, m, H] -> [B, K, G, q, H]."""
    B, K, G, rows, inner = x.shape
    flat = jnp.matmul(
        x.reshape(B * K, G * rows, inner), y.reshape(B * K, *y.shape[2:]), preferred_element_type=jnp.float32
    )
    return flat.reshape(B, K, G, rows, y.shape[3])


def _sum_over_queries(weights: jax.Array, x: jax.Array, target: Target) -> jax.Array:
    """[B, K, G, q, m] with [B, K, G, q, H] -> [B, K, m, H], summed over queries q and the heads G of a kv head."""
    B, K, G, rows, keys = weights.shape
    flat = jnp.matmul(
        transpose_copy(weights.reshape(B * K, G * rows, keys), target),
        x.reshape(B * K, G * rows, x.shape[-1]),
        preferred_element_type=jnp.float32,
    )
    return flat.reshape(B, K, keys, x.shape[-1])

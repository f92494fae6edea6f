"""The KV cache with XLA operations, for any device and for float or int8 dtypes."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from r3rag_jax.sampler.cache.base import KEYS_AXIS, Extent, LayerCache, cut_positions

MIN_BFLOAT16_ROWS = 16  # from this number of rows on, a bfloat16 matmul on a CPU is not converted to float32


class AttendBlocks(NamedTuple):
    """Block sizes, in positions, of attention from several tokens to the cache."""

    common: int  # for positions that all tokens see
    others: int  # for the remaining positions, which need a mask


CPU_BLOCKS = AttendBlocks(common=512, others=128)
ACCELERATOR_BLOCKS = AttendBlocks(
    common=512, others=512
)  # each iteration of a loop synchronises with the host, so blocks are large


class SoftmaxSums(NamedTuple):
    """Running state of an online softmax (arXiv 1805.02867); R = G * C query rows per kv head."""

    largest: jax.Array  # [B, K, R], largest score so far
    total: jax.Array  # [B, K, R], sum of the weights exp((score - largest) / sqrt(H))
    out: jax.Array  # [B, K, R, H], sum of the values times these weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class XLALayerCache(LayerCache):
    """Keys and values of one layer; in int8 every key and every value vector has its own scale."""

    blocks: AttendBlocks = dataclasses.field(default=CPU_BLOCKS, metadata={"static": True})

    @property
    def is_read_in_place(self) -> bool:
        return False

    def write(
        self, k_BCKH: jax.Array, v_BCKH: jax.Array, positions_BC: jax.Array, rows_B: jax.Array | None = None
    ) -> XLALayerCache:
        """See `LayerCache.write`."""
        new = XLALayerCache(k=k_BCKH, v=v_BCKH)  # the new entries of each array, [B, C, ...]
        if self.k_scale is not None:
            (k, k_scale), (v, v_scale) = quantize(k_BCKH), quantize(v_BCKH)
            new = XLALayerCache(k=k, v=v, k_scale=k_scale, v_scale=v_scale)

        def written(to: jax.Array, axis: int, new: jax.Array) -> jax.Array:
            new, block = new.astype(to.dtype), to.shape[axis]

            def at(positions: jax.Array) -> tuple[Any, ...]:
                """Indices after the row's. Keys have two index arrays (block, offset); these axes lead the result."""
                whole = slice(None)
                if axis == KEYS_AXIS:
                    return whole, positions // block, whole, positions % block
                return *(whole,) * (axis - 1), positions

            if (
                self.k.ndim == 4
            ):  # heads too are indexed: XLA's TPU compiler would reorder a cache with windows of heads
                rows = jnp.arange(len(positions_BC)) if rows_B is None else rows_B
                index = rows[:, None, None], jnp.arange(to.shape[1]), positions_BC[:, :, None]
                return to.at[index].set(new, mode="drop", unique_indices=True)
            if rows_B is not None:
                return to.at[rows_B[:, None], *at(positions_BC)].set(new, mode="drop", unique_indices=True)

            def write_row(to: jax.Array, new: jax.Array, at_C: jax.Array) -> jax.Array:
                new = new if axis == KEYS_AXIS else jnp.moveaxis(new, 0, axis - 1)
                return to.at[at(at_C)].set(new, mode="drop", unique_indices=True)

            return jax.vmap(write_row)(to, new, positions_BC)  # vmap, so that each device writes its own rows

        return self._map(written, new)

    def attend(
        self,
        q_BCNH: jax.Array,
        positions_BC: jax.Array,
        rows_B: jax.Array | None = None,
        extent: Extent | None = None,
    ) -> jax.Array:
        """See `LayerCache.attend`.

        A single token per row reads all positions at once, in the cache's dtype. Several tokens read block by block, in
        their own dtype, up to `extent.reach`. Masked positions have weight 0, so blocks beyond a row's last position do
        not change its result.

        The G query heads of a kv head and the C tokens form the R rows of one matmul, so that the cache is read once.
        XLA's CPU backend takes 5 times as long for an einsum over all axes (a decode step of 64 rows).
        """
        B, C, N, H = q_BCNH.shape
        K, S = self.v.shape[1:3]
        G, blocks = N // K, self.blocks
        q_BKRH = q_BCNH.reshape(B, C, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * C, H)
        zeros = jnp.zeros((B, K, G * C))
        sums = SoftmaxSums(zeros - jnp.inf, zeros, jnp.zeros((B, K, G * C, H)))
        if C == 1 or blocks.others >= S:
            sums = self._add_block(sums, q_BKRH, positions_BC, rows_B, 0, S, is_common=False)
        else:
            extent = extent or Extent(jnp.min(positions_BC) + 1, jnp.max(positions_BC) + 1)
            end = jnp.minimum(extent.reach, S)
            common: jax.Array | int = 0
            if blocks.common <= S:
                common = jnp.minimum(extent.common, end) // blocks.common * blocks.common
                sums = self._add_blocks(sums, q_BKRH, positions_BC, rows_B, (0, common, blocks.common), is_common=True)
            sums = self._add_blocks(sums, q_BKRH, positions_BC, rows_B, (common, end, blocks.others), is_common=False)
        out = (sums.out / sums.total[..., None]).reshape(B, K, G, C, H)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, C, N, H).astype(q_BCNH.dtype)

    def _add_blocks(
        self,
        sums: SoftmaxSums,
        q_BKRH: jax.Array,
        positions_BC: jax.Array,
        rows_B: jax.Array | None,
        span: tuple[jax.Array | int, jax.Array, int],
        *,
        is_common: bool,
    ) -> SoftmaxSums:
        """Add the positions of `span` = (start, end, block size) to the online softmax, block by block."""
        start, end, size = span

        def add(i: jax.Array, sums: SoftmaxSums) -> SoftmaxSums:
            return self._add_block(sums, q_BKRH, positions_BC, rows_B, start + i * size, size, is_common=is_common)

        return jax.lax.fori_loop(0, (end - start + size - 1) // size, add, sums)

    def _add_block(
        self,
        sums: SoftmaxSums,
        q_BKRH: jax.Array,
        positions_BC: jax.Array,
        rows_B: jax.Array | None,
        start: jax.Array | int,
        size: int,
        *,
        is_common: bool,
    ) -> SoftmaxSums:
        """Add positions start .. start + size to the online softmax; `is_common`: every token sees them, so no mask."""
        (B, K, R, H), C, S = q_BKRH.shape, positions_BC.shape[1], self.v.shape[2]
        dtype = self.k.dtype if C == 1 and self.k_scale is None else q_BKRH.dtype
        first = jnp.minimum(start, S - size)  # the last block is shifted back to end at S ...
        block = self._block(first, size, rows_B)
        scores = _scores(q_BKRH.astype(dtype), block.k.astype(dtype), by_block=C == 1)
        if block.k_scale is not None:
            scores = scores * block.k_scale[:, :, None]
        if not is_common:
            at = first + jnp.arange(size)
            is_seen = (at >= start) & (at <= positions_BC[:, :, None])  # ... so positions before `start` are masked
            scores = jnp.where(is_seen[:, None, None], scores.reshape(B, K, R // C, C, size), -jnp.inf)
            scores = scores.reshape(B, K, R, size)
        largest = jnp.maximum(sums.largest, jnp.max(scores, axis=-1))
        weights = jnp.exp((scores - largest[..., None]) * H**-0.5)
        shrink = jnp.exp((sums.largest - largest) * H**-0.5)
        total = sums.total * shrink + jnp.sum(weights, axis=-1)
        if block.v_scale is not None:
            weights = weights * block.v_scale[:, :, None]
        out = sums.out * shrink[..., None] + _matmul32(weights.astype(dtype), block.v.astype(dtype))
        return SoftmaxSums(largest, total, out)

    def _block(self, start: jax.Array, size: int, rows_B: jax.Array | None) -> XLALayerCache:
        """Copy positions start .. start + size of all rows or of rows_B."""

        def cut(x: jax.Array, axis: int) -> jax.Array:
            x = cut_positions(x, axis, start, size)
            return x if rows_B is None else x.at[rows_B].get(mode="clip")

        return self._map(cut)


def _scores(q_BKRH: jax.Array, k: jax.Array, by_block: bool) -> jax.Array:
    """Dot products with keys, float32 [B, K, R, S]; `by_block`: a matmul per block of keys [B, K, blocks, H, T]."""
    if k.ndim == 4:
        return _matmul32(q_BKRH, jnp.swapaxes(k, 2, 3))
    B, K, blocks, H, T = k.shape
    if not by_block or blocks == 1:
        return _matmul32(q_BKRH, jnp.swapaxes(k, 2, 3).reshape(B, K, H, blocks * T))
    # XLA would recompute the queries for every block. It materialises the result of a matmul, so multiply by 1.
    q_BKRH = _matmul32(q_BKRH, jnp.broadcast_to(jnp.eye(H, dtype=k.dtype), (B, K, H, H))).astype(k.dtype)
    q = jnp.broadcast_to(q_BKRH[:, :, None], (B, K, blocks, *q_BKRH.shape[2:]))
    scores = jnp.swapaxes(_matmul32(q, k), 2, 3)
    # The barrier makes XLA transpose once and not in each consumer.
    return jax.lax.optimization_barrier(scores.reshape(B, K, -1, blocks * T))


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantize [..., H] to int8 with one float32 scale per vector, [...]; the largest magnitude becomes 127."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8), scale


def _matmul32(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply [..., R, C] by [..., C, Z] of the same dtype to float32 [..., R, Z].

    XLA's CPU backend (jaxlib 0.10.2) cannot run a bfloat16 matmul with two batch dimensions and a float32 result
    ("Unsupported element type for DotThunk"). On CPUs the batch dimensions are flattened; matmuls of few rows, for
    which that is slower, are computed in float32.
    """

    def native(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y, preferred_element_type=jnp.float32)

    def on_cpu(x: jax.Array, y: jax.Array) -> jax.Array:
        if x.shape[-2] < MIN_BFLOAT16_ROWS:
            return native(x.astype(jnp.float32), y.astype(jnp.float32))
        flat = native(x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:]))
        return flat.reshape(*x.shape[:-1], y.shape[-1])

    if x.dtype == jnp.float32:
        return native(x, y)
    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=native)

"""Keys and values of tokens that were read: written at their positions, attended to by later ones.

Shapes: B rows, C new tokens, S positions of the cache, N query heads, K kv heads (N = K * G), H head dim.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, Self

import jax
import jax.numpy as jnp

from r3rag_jax.models.config import DecoderConfig

# Positions that several tokens attend to at once, on a CPU and elsewhere, where a loop waits for the host every round.
ATTEND_BLOCK, ACCELERATOR_BLOCK = 128, 2048


def fastest_dtype(compute: jax.typing.DTypeLike) -> jnp.dtype:
    """Of keys and values beside such compute: the same; float32 on a CPU, where a step widens all others."""
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else compute)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer; position s of a row is that of its token s.

    Keys are stored transposed, so that both matmuls of a decode step run along contiguous memory: on CPU this layout
    takes half the time of [B, S, K, H]. In int8, each key and each value has a scale of its own.
    """

    k: tuple[jax.Array, ...]  # Ly x [B, K, H, S]
    v: tuple[jax.Array, ...]  # Ly x [B, K, S, H]
    k_scale: tuple[jax.Array, ...] = ()  # of int8: Ly x float32 [B, K, S]
    v_scale: tuple[jax.Array, ...] = ()

    @classmethod
    def init(cls, config: DecoderConfig, batch: int, slots: int, dtype: jax.typing.DTypeLike) -> KVCache:
        """Return zeros for `batch` rows of `slots` positions."""
        K, H = config.num_kv_heads, config.head_dim

        def zeros(*shape: int, dtype: jax.typing.DTypeLike = dtype) -> tuple[jax.Array, ...]:
            # Distinct buffers: a donated pytree may not hold one array twice.
            return tuple(jnp.zeros((batch, K, *shape), dtype) for _ in range(config.num_layers))

        cache = cls(k=zeros(H, slots), v=zeros(slots, H))
        if jnp.dtype(dtype) != jnp.int8:
            return cache
        return dataclasses.replace(
            cache, k_scale=zeros(slots, dtype=jnp.float32), v_scale=zeros(slots, dtype=jnp.float32)
        )

    @property
    def num_rows(self) -> int:
        """B, as many as there are."""
        return self.v[0].shape[0]

    @property
    def slots(self) -> int:
        """S, the number of positions a row can hold."""
        return self.v[0].shape[2]

    def take(self, rows: jax.Array | None, slots: int | None = None) -> KVCache:
        """The first positions (None: all of them) of rows (int32 [R]; None: all, where they are)."""

        def cut(arrays: tuple[jax.Array, ...], axis: int) -> tuple[jax.Array, ...]:
            parts = tuple(jax.lax.slice_in_dim(x, 0, slots, axis=axis) for x in arrays)
            return parts if rows is None else tuple(x.at[rows].get(mode="clip") for x in parts)

        return KVCache(cut(self.k, 3), cut(self.v, 2), cut(self.k_scale, 2), cut(self.v_scale, 2))

    def put(self, rows: jax.Array | None, sub: KVCache) -> KVCache:
        """This cache with what `take` gave of the same rows, and as many positions as it has; rows >= B are dropped."""

        def write(whole: jax.Array, part: jax.Array) -> jax.Array:
            if rows is None:
                return jax.lax.dynamic_update_slice(whole, part, (0,) * whole.ndim)
            return whole.at[rows, :, *map(slice, part.shape[2:])].set(part, mode="drop")

        return jax.tree.map(write, self, sub)

    def write(
        self,
        layer: int,
        k_BCKH: jax.Array,
        v_BCKH: jax.Array,
        positions_BC: jax.Array,
        rows_B: jax.Array | None = None,
    ) -> KVCache:
        """Keys and values of a layer at their positions, of all rows or of rows_B.

        Positions >= S and rows >= B of the cache are dropped.
        """
        rows_B1 = (jnp.arange(positions_BC.shape[0]) if rows_B is None else rows_B)[:, None]
        scales = {}
        if self.k_scale:
            (k_BCKH, k_scale), (v_BCKH, v_scale) = quantize(k_BCKH), quantize(v_BCKH)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
                old = getattr(self, name)
                new = old[layer].at[rows_B1, :, positions_BC].set(scale, mode="drop", unique_indices=True)
                scales[name] = _replaced(old, layer, new)
        k, v = self.k[layer], self.v[layer]
        k = k.at[rows_B1, :, :, positions_BC].set(k_BCKH.astype(k.dtype), mode="drop", unique_indices=True)
        v = v.at[rows_B1, :, positions_BC].set(v_BCKH.astype(v.dtype), mode="drop", unique_indices=True)
        return dataclasses.replace(self, k=_replaced(self.k, layer, k), v=_replaced(self.v, layer, v), **scales)

    def attend(
        self, layer: int, q_BCNH: jax.Array, positions_BC: jax.Array, rows_B: jax.Array | None = None
    ) -> jax.Array:
        """Attend to positions of a layer up to each query's own; returns [B, C, N, H] of the queries' type.

        A single token reads a row at once; more of them block by block, and no block behind the last that one of them
        sees. Weights relative to the largest so far are summed up and scaled when a larger one comes
        (arXiv 1805.02867), so what a block behind all others' positions adds to a row is exactly nothing.

        The G query heads of a kv head and the C tokens are laid out as rows R of one matmul, so the cache is read
        once; left to an einsum over all the axes, XLA's CPU backend takes 5 x as long (a decode step of 64 rows).
        """
        B, C, N, H = q_BCNH.shape
        K, S = self.v[layer].shape[1:3]
        G = N // K
        size = S if C == 1 else min(ATTEND_BLOCK if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK, S)
        q_BKRH = q_BCNH.reshape(B, C, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * C, H)

        def add(number: jax.Array | int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            largest, total, out = sums
            start = jnp.minimum(number * size, S - size)  # the last block begins where it is whole ...
            at = start + jnp.arange(size)
            block = self._block(layer, start, size, rows_B)
            k, v = (x.astype(q_BKRH.dtype) if self.k_scale else x for x in (block.k[0], block.v[0]))
            scores = _einsum32("bkrh,bkhs->bkrs", q_BKRH.astype(k.dtype), k) * H**-0.5
            if self.k_scale:
                scores = scores * block.k_scale[0][:, :, None]
            is_seen = (at >= number * size) & (at <= positions_BC[:, :, None])  # ... and adds no position twice
            scores = jnp.where(is_seen[:, None, None], scores.reshape(B, K, G, C, size), -jnp.inf)
            scores = scores.reshape(B, K, G * C, size)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights, shrink = jnp.exp(scores - new_largest[..., None]), jnp.exp(largest - new_largest)
            total = total * shrink + jnp.sum(weights, axis=-1)
            if self.v_scale:
                weights = weights * block.v_scale[0][:, :, None]
            out = out * shrink[..., None] + _einsum32("bkrs,bksh->bkrh", weights.astype(v.dtype), v)
            return new_largest, total, out

        none = jnp.zeros((B, K, G * C))
        sums = (none - jnp.inf, none, jnp.zeros((B, K, G * C, H)))
        if size == S:
            _, total, out = add(0, sums)
        else:
            num_blocks = jnp.minimum(jnp.max(positions_BC), S - 1) // size + 1
            _, total, out = jax.lax.fori_loop(0, num_blocks, add, sums)
        out = (out / total[..., None]).reshape(B, K, G, C, H)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, C, N, H).astype(q_BCNH.dtype)

    def _block(self, layer: int, start: jax.Array, size: int, rows_B: jax.Array | None) -> KVCache:
        """Some positions of some rows of one layer."""

        def cut(arrays: tuple[jax.Array, ...], axis: int) -> tuple[jax.Array, ...]:
            if not arrays:
                return ()
            part = arrays[layer]
            if size < part.shape[axis]:
                part = jax.lax.dynamic_slice_in_dim(part, start, size, axis)
            return (part if rows_B is None else part.at[rows_B].get(mode="clip"),)

        return KVCache(cut(self.k, 3), cut(self.v, 2), cut(self.k_scale, 2), cut(self.v_scale, 2))


class Cache(Protocol):
    """What a forward of B rows reads and writes; see `KVCache`."""

    def write(self, layer: int, k_BCKH: jax.Array, v_BCKH: jax.Array, positions_BC: jax.Array) -> Self: ...

    def attend(self, layer: int, q_BCNH: jax.Array, positions_BC: jax.Array) -> jax.Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheRows:
    """Some rows of a cache, where they are: those that there are not are read somewhere and written nowhere."""

    cache: KVCache
    rows: jax.Array  # int32 [B], all different

    def write(self, layer: int, k_BCKH: jax.Array, v_BCKH: jax.Array, positions_BC: jax.Array) -> CacheRows:
        return CacheRows(self.cache.write(layer, k_BCKH, v_BCKH, positions_BC, self.rows), self.rows)

    def attend(self, layer: int, q_BCNH: jax.Array, positions_BC: jax.Array) -> jax.Array:
        return self.cache.attend(layer, q_BCNH, positions_BC, self.rows)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., H] as int8 times a scale, float32 [...]: the largest of each H has 127; zeros stay zeros."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8), scale


def _replaced(arrays: tuple[jax.Array, ...], place: int, new: jax.Array) -> tuple[jax.Array, ...]:
    return (*arrays[:place], new, *arrays[place + 1 :])


def _einsum32(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Contract two arrays of one dtype into float32.

    XLA's CPU backend (seen in jaxlib 0.10.2) cannot run a bfloat16 product of two batch dimensions with a
    float32 result ("Unsupported element type for DotThunk"); there the inputs are widened first.
    """

    def native(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

    def widened(x: jax.Array, y: jax.Array) -> jax.Array:
        return native(x.astype(jnp.float32), y.astype(jnp.float32))

    return jax.lax.platform_dependent(x, y, cpu=widened, default=native)

"""Keys and values of tokens that were read: written at their positions, attended to by later ones.

Shapes: B rows, C new tokens, S positions of the cache, N query heads, K kv heads (N = K * G), H head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.parallel.mesh import platform, traced_on
from r3rag_jax.parallel.shardings import partition_spec
from r3rag_jax.sampler.kernels.cpu import operations as cpu_kernels

KEYS = 4  # axis of a key's position in its block
KEY_BLOCK = 32  # positions whose keys lie together on a CPU; divides those of its AttendBlocks
MANY_ROWS = 16  # of a product, fewer of which a CPU is slower at in bfloat16 (measured: 3, and 384, where it is faster)


class AttendBlocks(NamedTuple):
    """Positions that several tokens attend to at once."""

    common: int  # of those that all of them see
    others: int


CPU_BLOCKS = AttendBlocks(common=512, others=128)
ACCELERATOR_BLOCKS = AttendBlocks(common=512, others=512)  # a loop waits for the host every round


class Extent(NamedTuple):
    """What several tokens see, int32 []: all of them the positions below `common`, none of them one from `reach` on."""

    common: jax.Array
    reach: jax.Array


def fastest_dtype(compute: jax.typing.DTypeLike, config: DecoderConfig, mesh: Mesh) -> jnp.dtype:
    """Of keys and values beside such compute: the same; float32 where XLA's CPU backend would widen all in a step."""

    def are_widened() -> bool:
        return platform() == "cpu" and not cpu_kernels.can_attend(config.head_dim, compute)

    return jnp.dtype("float32" if traced_on(mesh, are_widened)() else compute)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer; position s of a row is that of its token s.

    Keys are stored transposed, so that both matmuls of a decode step run along contiguous memory: on CPU this layout
    takes half the time of [B, S, K, H]. Of a whole row that is not contiguous enough there: a matmul reads some columns
    of all H, so positions lie in blocks of T = KEY_BLOCK (half the time again), where S divides; elsewhere T = S.
    In int8, each key and each value has a scale of its own.
    """

    k: jax.Array  # [B, K, S / T, H, T]
    v: jax.Array  # [B, K, S, H]
    k_scale: jax.Array | None = None  # of int8: float32 [B, K, S]
    v_scale: jax.Array | None = None

    @classmethod
    def init(cls, config: DecoderConfig, batch: int, slots: int, dtype: jax.typing.DTypeLike) -> LayerCache:
        """Return zeros."""
        K, H = config.num_kv_heads, config.head_dim
        T = KEY_BLOCK if platform() == "cpu" and slots % KEY_BLOCK == 0 else slots
        cache = cls(k=jnp.zeros((batch, K, slots // T, H, T), dtype), v=jnp.zeros((batch, K, slots, H), dtype))
        if jnp.dtype(dtype) != jnp.int8:
            return cache
        # Distinct buffers: a donated pytree may not hold one array twice.
        k_scale, v_scale = jnp.zeros((batch, K, slots)), jnp.zeros((batch, K, slots))
        return dataclasses.replace(cache, k_scale=k_scale, v_scale=v_scale)

    @property
    def is_read_in_place(self) -> bool:
        """Whether attention reads of each row what it sees, and no more: a part of the cache is then no cheaper."""
        return self.k.shape[KEYS] == KEY_BLOCK and cpu_kernels.can_attend(self.v.shape[3], self.k.dtype)

    def write(
        self, k_BCKH: jax.Array, v_BCKH: jax.Array, positions_BC: jax.Array, rows_B: jax.Array | None = None
    ) -> LayerCache:
        """Keys and values at their positions, of all rows or of rows_B.

        Positions >= S and rows >= B of the cache are dropped.
        """
        if self.is_read_in_place:
            rows_B = jnp.arange(len(positions_BC)) if rows_B is None else rows_B
            return LayerCache(*cpu_kernels.write(self.k, self.v, k_BCKH, v_BCKH, positions_BC, rows_B))
        new = LayerCache(k_BCKH, v_BCKH)  # what is new of each array, [B, C, ...]
        if self.k_scale is not None:
            (k, k_scale), (v, v_scale) = quantize(k_BCKH), quantize(v_BCKH)
            new = LayerCache(k, v, k_scale, v_scale)

        def written(to: jax.Array, axis: int, new: jax.Array) -> jax.Array:
            new, block = new.astype(to.dtype), to.shape[axis]

            def at(positions: jax.Array) -> tuple[Any, ...]:
                """Indices behind that of the row; of keys there are two, whose axes come first in what they select."""
                whole = slice(None)
                if axis == KEYS:
                    return whole, positions // block, whole, positions % block
                return *(whole,) * (axis - 1), positions

            if rows_B is not None:
                return to.at[rows_B[:, None], *at(positions_BC)].set(new, mode="drop", unique_indices=True)

            def write_row(to: jax.Array, new: jax.Array, at_C: jax.Array) -> jax.Array:
                new = new if axis == KEYS else jnp.moveaxis(new, 0, axis - 1)
                return to.at[at(at_C)].set(new, mode="drop", unique_indices=True)

            return jax.vmap(write_row)(to, new, positions_BC)  # each device its own, where rows are split

        return self._map(written, new)

    def attend(
        self,
        q_BCNH: jax.Array,
        positions_BC: jax.Array,
        rows_B: jax.Array | None = None,
        extent: Extent | None = None,
    ) -> jax.Array:
        """Attend to positions up to each query's own, of all rows or of rows_B; [B, C, N, H] of the queries' type.

        Where the cache is read in place, a kernel does this. Else a single token reads a row at once, in the cache's
        type; more of them block by block, in their own type, and no block behind the extent (None: that of
        positions_BC). Weights relative to the largest so far are summed up and scaled when a larger one comes (arXiv
        1805.02867), so what a block behind all others' positions adds to a row is exactly nothing.

        The G query heads of a kv head and the C tokens are laid out as rows R of one matmul, so the cache is read
        once; left to an einsum over all the axes, XLA's CPU backend takes 5 x as long (a decode step of 64 rows).
        """
        B, C, N, H = q_BCNH.shape
        if self.is_read_in_place:
            rows_B = jnp.arange(B) if rows_B is None else rows_B
            return cpu_kernels.attend(q_BCNH, self.k, self.v, positions_BC, rows_B)
        K, S = self.v.shape[1:3]
        G = N // K
        q_BKRH = q_BCNH.reshape(B, C, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * C, H)
        dtype = self.k.dtype if C == 1 and self.k_scale is None else q_BKRH.dtype

        def add(start: jax.Array | int, size: int, is_common: bool, sums: tuple[jax.Array, ...]) -> tuple[Any, ...]:
            """Sums with those of a block, all of which is seen by all, or not."""
            largest, total, out = sums
            whole = jnp.minimum(start, S - size)  # the last block begins where it is whole ...
            block = self._block(whole, size, rows_B)
            scores = _products(q_BKRH.astype(dtype), block.k.astype(dtype), apart=C == 1)
            if block.k_scale is not None:
                scores = scores * block.k_scale[:, :, None]
            if not is_common:
                at = whole + jnp.arange(size)
                is_seen = (at >= start) & (at <= positions_BC[:, :, None])  # ... and adds no position twice
                scores = jnp.where(is_seen[:, None, None], scores.reshape(B, K, G, C, size), -jnp.inf)
                scores = scores.reshape(B, K, G * C, size)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights = jnp.exp((scores - new_largest[..., None]) * H**-0.5)
            shrink = jnp.exp((largest - new_largest) * H**-0.5)
            total = total * shrink + jnp.sum(weights, axis=-1)
            if block.v_scale is not None:
                weights = weights * block.v_scale[:, :, None]
            out = out * shrink[..., None] + _matmul32(weights.astype(dtype), block.v.astype(dtype))
            return new_largest, total, out

        def add_all(
            start: jax.Array | int, end: jax.Array, size: int, is_common: bool, sums: tuple[jax.Array, ...]
        ) -> tuple[Any, ...]:
            num_blocks = (end - start + size - 1) // size
            return jax.lax.fori_loop(0, num_blocks, lambda i, sums: add(start + i * size, size, is_common, sums), sums)

        none = jnp.zeros((B, K, G * C))
        sums: tuple[jax.Array, ...] = (none - jnp.inf, none, jnp.zeros((B, K, G * C, H)))
        blocks = CPU_BLOCKS if platform() == "cpu" else ACCELERATOR_BLOCKS
        if C == 1 or blocks.others >= S:
            _, total, out = add(0, S, False, sums)
        else:
            extent = extent or Extent(jnp.min(positions_BC) + 1, jnp.max(positions_BC) + 1)
            end = jnp.minimum(extent.reach, S)
            common: jax.Array | int = 0
            if blocks.common <= S:
                common = jnp.minimum(extent.common, end) // blocks.common * blocks.common
                sums = add_all(0, common, blocks.common, True, sums)
            _, total, out = add_all(common, end, blocks.others, False, sums)
        out = (out / total[..., None]).reshape(B, K, G, C, H)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, C, N, H).astype(q_BCNH.dtype)

    def _block(self, start: jax.Array, size: int, rows_B: jax.Array | None) -> LayerCache:
        """Some positions of some rows."""

        def cut(x: jax.Array, axis: int) -> jax.Array:
            x = _cut(x, axis, start, size)
            return x if rows_B is None else x.at[rows_B].get(mode="clip")

        return self._map(cut)

    def take(self, rows: jax.Array | None, slots: int | None = None) -> LayerCache:
        """See `KVCache.take`."""

        def cut(x: jax.Array, axis: int) -> jax.Array:
            part = x if slots is None else _cut(x, axis, 0, slots)
            return part if rows is None else part.at[rows].get(mode="clip")

        return self._map(cut)

    def _map(self, function: Callable[..., jax.Array], *others: LayerCache) -> LayerCache:
        """The function of each array, of the axis of its positions and of its like in others."""
        axes = LayerCache(k=KEYS, v=2, k_scale=2, v_scale=2)  # type: ignore[arg-type]
        if self.k_scale is None:
            axes = dataclasses.replace(axes, k_scale=None, v_scale=None)
        return jax.tree.map(function, self, axes, *others)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer."""

    layers: tuple[LayerCache, ...]

    @classmethod
    def init(cls, config: DecoderConfig, batch: int, slots: int, dtype: jax.typing.DTypeLike) -> KVCache:
        """Return zeros for `batch` rows of `slots` positions."""
        return cls(tuple(LayerCache.init(config, batch, slots, dtype) for _ in range(config.num_layers)))

    def shardings(self, mesh: Mesh) -> KVCache:
        """Rows over (data, fsdp), kv heads over tensor, where they divide."""
        rest = lambda leaf: ("batch", "kv_heads") + (None,) * (leaf.ndim - 2)  # noqa: E731
        return jax.tree.map(lambda x: NamedSharding(mesh, partition_spec(mesh, rest(x), x.shape)), self)

    @property
    def num_rows(self) -> int:
        """B, as many as there are."""
        return self.layers[0].v.shape[0]

    @property
    def is_read_in_place(self) -> bool:
        """See `LayerCache.is_read_in_place`."""
        return self.layers[0].is_read_in_place

    @property
    def slots(self) -> int:
        """S, the number of positions a row can hold."""
        return self.layers[0].v.shape[2]

    def take(self, rows: jax.Array | None, slots: int | None = None) -> KVCache:
        """The first positions (whole blocks of keys; None: all) of rows (int32 [R]; None: all, where they are)."""
        return KVCache(tuple(layer.take(rows, slots) for layer in self.layers))

    def put(self, rows: jax.Array | None, sub: KVCache) -> KVCache:
        """This cache with what `take` gave of the same rows, and as many positions as it has; rows >= B are dropped."""

        def write(whole: jax.Array, part: jax.Array) -> jax.Array:
            if rows is None:
                return jax.lax.dynamic_update_slice(whole, part, (0,) * whole.ndim)
            return whole.at[rows, :, *map(slice, part.shape[2:])].set(part, mode="drop")

        return jax.tree.map(write, self, sub)


def padded(slots: int) -> int:
    """The fewest positions, at least so many, of whole blocks of keys."""
    return -(-slots // KEY_BLOCK) * KEY_BLOCK


def _cut(x: jax.Array, axis: int, start: jax.Array | int, size: int) -> jax.Array:
    """Positions start .. start + size; of keys in several blocks, whole ones."""
    if axis == KEYS and x.shape[2] > 1:
        block, axis = x.shape[KEYS], 2
        start, size = start // block, size // block
    return x if size == x.shape[axis] else jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _products(q_BKRH: jax.Array, k: jax.Array, apart: bool) -> jax.Array:
    """Queries with keys [B, K, blocks, H, T], float32 [B, K, R, blocks * T]; `apart`: block by block, as they lie."""
    B, K, blocks, H, T = k.shape
    if not apart or blocks == 1:
        return _matmul32(q_BKRH, jnp.swapaxes(k, 2, 3).reshape(B, K, H, blocks * T))
    # By way of the identity, for a factor of a product is written: else what makes the queries is done for every block.
    q_BKRH = _matmul32(q_BKRH, jnp.broadcast_to(jnp.eye(H, dtype=k.dtype), (B, K, H, H))).astype(k.dtype)
    q = jnp.broadcast_to(q_BKRH[:, :, None], (B, K, blocks, *q_BKRH.shape[2:]))
    scores = jnp.swapaxes(_matmul32(q, k), 2, 3)
    return jax.lax.optimization_barrier(scores.reshape(B, K, -1, blocks * T))  # turned once, not by all who read it


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., H] as int8 times a scale, float32 [...]: the largest of each H has 127; zeros stay zeros."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8), scale


def _matmul32(x: jax.Array, y: jax.Array) -> jax.Array:
    """[..., R, C] times [..., C, Z] of one dtype, float32 [..., R, Z].

    XLA's CPU backend (seen in jaxlib 0.10.2) cannot run a bfloat16 product of two batch dimensions with a float32
    result ("Unsupported element type for DotThunk"); there they are one, or, of few rows, which it takes longer for so
    than for float32, the factors are widened.
    """

    def native(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y, preferred_element_type=jnp.float32)

    def on_cpu(x: jax.Array, y: jax.Array) -> jax.Array:
        if x.shape[-2] < MANY_ROWS:
            return native(x.astype(jnp.float32), y.astype(jnp.float32))
        flat = native(x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:]))
        return flat.reshape(*x.shape[:-1], y.shape[-1])

    if x.dtype == jnp.float32:
        return native(x, y)
    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=native)

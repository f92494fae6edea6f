"""The interface of a layer's KV cache, and what its memory layouts share.

Shapes: B rows, C new tokens, S positions of the cache, N query heads, K kv heads (N = K * G), H head dim,
T positions per block of keys. On a mesh K and N count the head slots of `layout.HeadSlots`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax

from r3rag_jax.sampler.kernels.cpu.build import KEY_BLOCK

KEYS_AXIS = 4  # axis with the position inside a block, of keys in blocks


class Extent(NamedTuple):
    """Bounds on the positions that a set of tokens sees: all tokens see positions < common, none sees any >= reach."""

    common: jax.Array  # int32 []
    reach: jax.Array  # int32 []


@dataclasses.dataclass(frozen=True)
class LayerCache(abc.ABC):
    """Keys and values of one layer; position s of a row belongs to its token s.

    On a CPU keys are stored transposed, in blocks of T positions, so that both matmuls of a decode step read contiguous
    memory. With T = 32 they take a quarter of the time that a layout [B, S, K, H] takes. On other devices keys lie as
    values do, the layout that XLA's TPU compiler chooses; it would copy all keys of any other into it in every call.
    """

    k: jax.Array  # [B, K, S / T, H, T] on a CPU, else [B, K, S, H]
    v: jax.Array  # [B, K, S, H]
    k_scale: jax.Array | None = None  # int8 only: float32 [B, K, S], one scale per key
    v_scale: jax.Array | None = None  # int8 only: float32 [B, K, S], one scale per value

    @property
    @abc.abstractmethod
    def is_read_in_place(self) -> bool:
        """Whether attention reads only what each row sees, so that decoding on a smaller copy saves nothing."""

    @abc.abstractmethod
    def write(
        self, k_BCKH: jax.Array, v_BCKH: jax.Array, positions_BC: jax.Array, rows_B: jax.Array | None = None
    ) -> Self:
        """Write keys and values at their positions; returns the new cache.

        rows_B (int32) are indices of the cache rows; None: all rows in order. Positions >= S and out-of-range rows are
        not written.
        """

    @abc.abstractmethod
    def attend(
        self,
        q_BCNH: jax.Array,
        positions_BC: jax.Array,
        rows_B: jax.Array | None = None,
        extent: Extent | None = None,
    ) -> jax.Array:
        """Attend causally: each query sees the positions of its row up to its own.

        Args:
            q_BCNH: queries.
            positions_BC: int32, positions of the queries.
            rows_B: int32, indices of the cache rows; None: all rows in order.
            extent: bounds of the positions to read; None: derived from positions_BC.

        Returns:
            [B, C, N, H] in the queries' dtype.
        """

    def take(self, rows: jax.Array | None, slots: int | None = None) -> Self:
        """See `KVCache.take`."""

        def cut(x: jax.Array, axis: int) -> jax.Array:
            taken = x if slots is None else cut_positions(x, axis, 0, slots)
            return taken if rows is None else taken.at[rows].get(mode="clip")

        return self._map(cut)

    def _map(self, function: Callable[..., jax.Array], *others: Any) -> Self:
        """Replace each array by function(array, axis of its positions, arrays of the same name in `others`)."""
        names = {"k": KEYS_AXIS if self.k.ndim > KEYS_AXIS else 2, "v": 2}
        names |= {} if self.k_scale is None else {"k_scale": 2, "v_scale": 2}
        arrays = {
            name: function(getattr(self, name), axis, *(getattr(other, name) for other in others))
            for name, axis in names.items()
        }
        return dataclasses.replace(self, **arrays)


def padded(slots: int) -> int:
    """`slots` rounded up to a multiple of KEY_BLOCK."""
    return -(-slots // KEY_BLOCK) * KEY_BLOCK


def cut_positions(x: jax.Array, axis: int, start: jax.Array | int, size: int) -> jax.Array:
    """Slice positions start .. start + size; of keys in several blocks, start and size must be multiples of T."""
    if axis == KEYS_AXIS and x.shape[2] > 1:
        block, axis = x.shape[KEYS_AXIS], 2
        start, size = start // block, size // block
    return x if size == x.shape[axis] else jax.lax.dynamic_slice_in_dim(x, start, size, axis)

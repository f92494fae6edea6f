"""What every layout of a layer's cache has in common.

Shapes: B rows, C new tokens, S positions of the cache, N query heads, K kv heads (N = K * G), H head dim,
T positions of a block of keys.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax

from r3rag_jax.sampler.kernels.cpu.build import KEY_BLOCK

KEYS_AXIS = 4  # axis of a key's position within its block


class Extent(NamedTuple):
    """Which positions several tokens see, int32 []: every token those below `common`, none those from `reach` on."""

    common: jax.Array
    reach: jax.Array


@dataclasses.dataclass(frozen=True)
class LayerCache(abc.ABC):
    """Keys and values of one layer; position s of a row belongs to its token s.

    Keys are stored transposed, in blocks of T positions, so that both matmuls of a decode step run along contiguous
    memory: on a CPU, T = 32 takes a quarter of the time of [B, S, K, H]. Elsewhere T = S.
    """

    k: jax.Array  # [B, K, S / T, H, T]
    v: jax.Array  # [B, K, S, H]
    k_scale: jax.Array | None = None  # int8 only: float32 [B, K, S], a scale per key
    v_scale: jax.Array | None = None

    @property
    @abc.abstractmethod
    def is_read_in_place(self) -> bool:
        """Whether attention reads just the positions that a row sees, so that a smaller copy is no cheaper."""

    @abc.abstractmethod
    def write(
        self, k_BCKH: jax.Array, v_BCKH: jax.Array, positions_BC: jax.Array, rows_B: jax.Array | None = None
    ) -> Self:
        """Write keys and values at their positions, of all rows or of rows_B.

        Positions >= S and rows >= B of the cache are not written.
        """

    @abc.abstractmethod
    def attend(
        self,
        q_BCNH: jax.Array,
        positions_BC: jax.Array,
        rows_B: jax.Array | None = None,
        extent: Extent | None = None,
    ) -> jax.Array:
        """Attend to positions up to each query's own, of all rows or of rows_B; [B, C, N, H] of the queries' dtype.

        `extent` bounds what is read; None: the extent of positions_BC.
        """

    def take(self, rows: jax.Array | None, slots: int | None = None) -> Self:
        """See `KVCache.take`."""

        def cut(x: jax.Array, axis: int) -> jax.Array:
            part = x if slots is None else cut_positions(x, axis, 0, slots)
            return part if rows is None else part.at[rows].get(mode="clip")

        return self._map(cut)

    def _map(self, function: Callable[..., jax.Array], *others: Any) -> Self:
        """Apply a function to each array, the axis of its positions, and the arrays of the same name in others."""
        names = {"k": KEYS_AXIS, "v": 2}
        names |= {} if self.k_scale is None else {"k_scale": 2, "v_scale": 2}
        arrays = {
            name: function(getattr(self, name), axis, *(getattr(other, name) for other in others))
            for name, axis in names.items()
        }
        return dataclasses.replace(self, **arrays)


def padded(slots: int) -> int:
    """The fewest positions, at least `slots`, that make whole blocks of keys."""
    return -(-slots // KEY_BLOCK) * KEY_BLOCK


def cut_positions(x: jax.Array, axis: int, start: jax.Array | int, size: int) -> jax.Array:
    """Positions start .. start + size; whole blocks where keys lie in several."""
    if axis == KEYS_AXIS and x.shape[2] > 1:
        block, axis = x.shape[KEYS_AXIS], 2
        start, size = start // block, size // block
    return x if size == x.shape[axis] else jax.lax.dynamic_slice_in_dim(x, start, size, axis)

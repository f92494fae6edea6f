"""A matrix that devices have shards of, gathered a block of one dimension at a time.

The output matrix and the table of embeddings take gigabytes where they are whole: 1.1 GB in bfloat16 for Qwen2.5-7B,
and 2.2 GB for the sum of a gradient in float32. Of a block both take a ninth, and a device has few blocks at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from r3rag_jax.parallel.collectives import Dims, gather, scatter
from r3rag_jax.parallel.target import Target

MAX_ELEMENTS = 2**26  # of a block
LANES = 128  # entries of the last axis of a tile of a TPU
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a matrix is cut into blocks of one dimension; static.

    Entry c of this dimension of a device's shard is in block c // size. A block is gathered from all shards: where the
    dimension itself is split, it has `size` entries of each, shard after shard. The last block may reach back into the
    one before it, whose entries do not count again.
    """

    dim: int  # the dimension that is cut
    length: int  # its entries in a shard
    size: int  # of these, the entries in a block
    factors: tuple[int, ...]  # number of shards along each dimension
    split: Dims  # all dimensions that devices have shards of
    unroll: bool = False  # CPUs deadlock where a loop has collectives that do not depend on those outside it

    @classmethod
    def of(cls, shape: tuple[int, ...], dim: int, split: Dims, target: Target) -> Blocks:
        """As few blocks as `MAX_ELEMENTS` allows, of about the same size.

        Args:
            shape: of a device's shard.
            dim: the dimension to cut.
            split: the dimensions that devices have shards of.
        """
        factors = _factors(split, len(shape), target)
        total = math.prod(shape) * math.prod(factors)
        length, num = shape[dim], -(-total // MAX_ELEMENTS) if split else 1
        size = -(-length // num)
        size = -(-size // LANES) * LANES if size > LANES else size
        return cls(dim, length, min(size, length), factors, split, target.is_cpu)

    @property
    def num(self) -> int:
        """Number of blocks."""
        return -(-self.length // self.size)

    @property
    def ways(self) -> int:
        """Number of shards along the cut dimension."""
        return self.factors[self.dim]

    @property
    def width(self) -> int:
        """Entries of the cut dimension in a gathered block."""
        return self.ways * self.size

    @property
    def is_even(self) -> bool:
        """Whether no block reaches back into the one before it."""
        return self.length % self.size == 0

    def gather(self, shard: jax.Array, index: Any, dtype: Any) -> jax.Array:
        """A block, cast to `dtype` before it is sent; not differentiable."""
        block = lax.dynamic_slice_in_dim(shard, self._start(index), self.size, axis=self.dim)
        return gather(block, self.split, dtype, dtype)

    def scatter(self, grad: jax.Array) -> jax.Array:
        """A block's gradient, summed over devices in float32: the shard of each device."""
        return scatter(grad, self.split)

    def join(self, shards: jax.Array) -> jax.Array:
        """The gradient of a shard of the matrix from those of all blocks, [num, ...]."""
        last, dim = self.num - 1, self.dim
        tail = lax.slice_in_dim(shards[last], self.num * self.size - self.length, self.size, axis=dim)
        if last == 0:
            return tail
        before = jnp.moveaxis(shards[:last], 0, dim)
        before = before.reshape(*tail.shape[:dim], last * self.size, *tail.shape[dim + 1 :])
        return jnp.concatenate([before, tail], axis=dim)

    def ids(self, index: Any) -> jax.Array:
        """int32 [width]: where in the matrix the entries of a block stand; -1: in the block before it."""
        at = self._start(index) + jnp.arange(self.size)
        of_shards = jnp.arange(self.ways)[:, None] * self.length + at
        return jnp.where(at >= index * self.size, of_shards, -1).reshape(-1)

    def positions(self, ids: jax.Array, index: Any) -> jax.Array:
        """Where in a block entries of the matrix stand; `width`, which is out of range, for those of other blocks."""
        shard, at = ids // self.length, ids % self.length
        is_here = (ids >= 0) & (ids < self.ways * self.length) & (at // self.size == index)
        return jnp.where(is_here, shard * self.size + at - self._start(index), self.width)

    def scan(self, body: Callable[[T, Any], tuple[T, Any]], start: T) -> tuple[T, Any]:
        """`lax.scan` of `body` over the indices of all blocks."""
        if self.num > 1:
            return lax.scan(body, start, jnp.arange(self.num), unroll=self.num if self.unroll else 1)
        end, found = body(start, 0)
        return end, jax.tree.map(lambda x: x[None], found)

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the matrix, from that of a shard."""
        return tuple(size * factor for size, factor in zip(shape, self.factors, strict=True))

    def _start(self, index: Any) -> Any:
        return 0 if self.num == 1 else jnp.minimum(index * self.size, self.length - self.size)


def _factors(split: Dims, num_dims: int, target: Target) -> tuple[int, ...]:
    axes = dict(split)
    return tuple(math.prod(target.ways(axis) for axis in axes.get(dim, ())) for dim in range(num_dims))

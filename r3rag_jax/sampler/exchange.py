"""What the devices of a mesh exchange in a forward of the sampler; called inside `jax.shard_map`.

Shapes on one device: b rows of its own, C tokens of each, D width, O outputs or inputs of a matrix that is split. The
rows of a group are those of all devices along `fsdp`, in order.

Every matrix is split by its outputs (qkv, gate and up, output layer) or by its inputs (o, down), so a layer needs its
input whole and gives partial sums, which are added in float32. Each device adds the result to its own rows of the
residual stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from r3rag_jax.parallel.shardings import RULES

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """No exchange: one device has all rows, tokens and weights. Static in jitted functions."""

    def weight(self, w: jax.Array) -> jax.Array:
        """The part of a matrix or bias, split along its first axis, that the device multiplies with."""
        return w

    def after(self, x: jax.Array, weights: T) -> T:
        """A layer's weights, of which nothing is exchanged before the input x of the layer is there."""
        return weights

    def whole(self, h: jax.Array) -> jax.Array:
        """Hidden states [b, C, D] of the residual stream -> those that the device multiplies."""
        return h

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Add partial sums for the result of `whole`, float32, to the device's share x of the residual stream."""
        return x + y.astype(x.dtype)

    def own_rows(self, y: jax.Array) -> jax.Array:
        """[group's rows, ..., O] for the device's share of outputs -> [b, ..., outputs of all devices of `fsdp`]."""
        return y

    def own_columns(self, x: jax.Array) -> jax.Array:
        """[b, ..., inputs] -> [group's rows, ..., O], the device's share of the inputs; the inverse of `own_rows`."""
        return x

    def embed(self, lookup: Callable[[jax.Array], jax.Array], ids: jax.Array) -> jax.Array:
        """Embed the device's ids [b, C] -> its share of the residual stream. `lookup`: ids -> its columns of these."""
        return lookup(ids)

    def sample(self, sample: Callable[[jax.Array, T], Any], logits: jax.Array, rows: T) -> Any:
        """Sample the device's b rows.

        Args:
            sample: (logits [R, V], state of these rows) -> pytree of arrays [R, ...].
            logits: float32 [group's rows, O].
            rows: state of the device's rows, a pytree of arrays [b, ...].
        """
        return sample(logits, rows)

    def total(self, count: jax.Array) -> jax.Array:
        """The sum of a number over the rows of all devices."""
        return count


ALONE = Exchange()


@dataclasses.dataclass(frozen=True)
class _OnMesh(Exchange):
    """What decode and prefill have in common on several devices."""

    tensor: int  # devices along `tensor`, which have the same rows
    fsdp: int  # devices along `fsdp` over which weights are split; 1: each has all of them
    are_rows_split: bool  # over (data, fsdp); else all devices have all rows

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        # In float32: XLA would add the parts in bfloat16 if their sum were rounded to it before the addition to x.
        return (x.astype(y.dtype) + self._summed(y)).astype(x.dtype)

    def _summed(self, y: jax.Array) -> jax.Array:
        """The sums of the devices' y, for the device's share of the residual stream."""
        raise NotImplementedError

    def embed(self, lookup: Callable[[jax.Array], jax.Array], ids: jax.Array) -> jax.Array:
        """The table is split by columns, so that ids and not vectors go to all devices, and nothing is summed."""
        return self._from_columns(self._to_rows(lookup(self._group(ids))))

    def total(self, count: jax.Array) -> jax.Array:
        return jax.lax.psum(count, RULES["batch"]) if self.are_rows_split else count

    def _group(self, x: jax.Array) -> jax.Array:
        """[b, ...] -> [group's rows, ...]."""
        if self.fsdp == 1 or not self.are_rows_split:
            return x
        return jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)

    def _to_rows(self, y: jax.Array) -> jax.Array:
        """See `own_rows`; for weights that are split over `fsdp`."""
        last = y.ndim - 1
        if self.fsdp == 1:
            return y
        if self.are_rows_split:
            return jax.lax.all_to_all(y, "fsdp", 0, last, tiled=True)
        return jax.lax.all_gather(y, "fsdp", axis=last, tiled=True)

    def _from_columns(self, x: jax.Array) -> jax.Array:
        """[b, C, D / tensor] -> the device's share of the residual stream, [b, C, D] or fewer tokens."""
        return x if self.tensor == 1 else jax.lax.all_gather(x, "tensor", axis=2, tiled=True)


@dataclasses.dataclass(frozen=True)
class PartialSums(_OnMesh):
    """Decode: weights stay where they are, and the few rows move. The devices along `tensor` have the same rows.

    For a layer of 7B and 128 rows on 64 devices (fsdp=64) a device receives 5.5 MB of hidden states and sums, but would
    receive 459 MB of weights.
    """

    def whole(self, h: jax.Array) -> jax.Array:
        return self._group(h)

    def own_rows(self, y: jax.Array) -> jax.Array:
        return self._to_rows(y)

    def own_columns(self, x: jax.Array) -> jax.Array:
        last = x.ndim - 1
        if self.fsdp == 1:
            return x
        if self.are_rows_split:
            return jax.lax.all_to_all(x, "fsdp", last, 0, tiled=True)
        return _share(x, "fsdp", self.fsdp, last)

    def _summed(self, y: jax.Array) -> jax.Array:
        if self.fsdp > 1 and self.are_rows_split:
            y = jax.lax.psum_scatter(y, "fsdp", scatter_dimension=0, tiled=True)
            return y if self.tensor == 1 else jax.lax.psum(y, "tensor")
        axes = [axis for axis, size in (("tensor", self.tensor), ("fsdp", self.fsdp)) if size > 1]
        return jax.lax.psum(y, tuple(axes)) if axes else y

    def sample(self, sample: Callable[[jax.Array, T], Any], logits: jax.Array, rows: T) -> Any:
        """Devices along `tensor` sample a share of the rows each, or all of them if they do not divide."""
        logits = self._to_rows(logits)
        if self.tensor == 1:
            return sample(logits, rows)
        if len(logits) % self.tensor:
            return sample(jax.lax.all_gather(logits, "tensor", axis=1, tiled=True), rows)
        logits = jax.lax.all_to_all(logits, "tensor", 0, 1, tiled=True)
        drawn = sample(logits, jax.tree.map(lambda x: _share(x, "tensor", self.tensor, 0), rows))
        return jax.tree.map(lambda x: jax.lax.all_gather(x, "tensor", axis=0, tiled=True), drawn)


@dataclasses.dataclass(frozen=True)
class GatheredWeights(_OnMesh):
    """Prefill: every device gathers the weights of a layer when it needs them, and multiplies its own rows.

    For a layer of 7B and 1,024 tokens on each of 64 devices (fsdp=64) a device receives 459 MB of weights; hidden
    states and sums, as in decode, would be 2.8 GB. Along `tensor` the tokens of the residual stream are split (sequence
    parallelism, arXiv 2205.05198), so sums are scattered in float32 and only bfloat16 is gathered.
    """

    splits_tokens: bool = False  # over `tensor`, which must divide their number

    def after(self, x: jax.Array, weights: T) -> T:
        # XLA would gather the weights of many layers ahead, and hold them all.
        return weights if self.fsdp == 1 else jax.lax.optimization_barrier((weights, x))[0]

    def weight(self, w: jax.Array) -> jax.Array:
        return w if self.fsdp == 1 else jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)

    def whole(self, h: jax.Array) -> jax.Array:
        return jax.lax.all_gather(h, "tensor", axis=1, tiled=True) if self.splits_tokens else h

    def _summed(self, y: jax.Array) -> jax.Array:
        if self.splits_tokens:
            return jax.lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True)
        return y if self.tensor == 1 else jax.lax.psum(y, "tensor")

    def _from_columns(self, x: jax.Array) -> jax.Array:
        if self.splits_tokens:
            return jax.lax.all_to_all(x, "tensor", 1, 2, tiled=True)
        return super()._from_columns(x)


def _share(x: jax.Array, axis_name: str, ways: int, axis: int) -> jax.Array:
    """The part of an axis, cut into `ways` equal parts, that belongs to the device."""
    size = x.shape[axis] // ways
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis_name) * size, size, axis)

"""Exact nearest neighbours on the devices: vectors sharded over all devices of a mesh, top-k on each, then a merge.

Shapes: P vectors of D floats, B queries, n devices, R rows on each device, C rows of a chunk, k neighbours. Device d
holds vectors [d R, (d + 1) R); n R >= P, and the rows from P on are zero and never found.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from r3rag_jax.retrieval.vectors import VectorShards

AXIS = "devices"
VectorType = Literal["float32", "bfloat16", "int8"]
_CHUNK = 65_536  # rows whose scores are computed at once: bounds the scores in memory to 4 B bytes times this
_GROUP = 128  # scores per group; a row of scores is searched through the maxima of its groups
_READ = 16_384  # rows that are read and converted at once: bounds the host's memory beside a device's shard


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the vectors are split: static in jitted functions."""

    num_vectors: int  # P
    num_devices: int  # n
    chunk: int  # C

    @classmethod
    def of(cls, num_vectors: int, num_devices: int) -> Layout:
        """Equal numbers of equal chunks on all devices, of whole groups where a device has more than one."""
        rows = -(-num_vectors // num_devices)
        chunk = -(-rows // -(-rows // _CHUNK))
        return cls(num_vectors, num_devices, chunk if chunk <= _GROUP else -(-chunk // _GROUP) * _GROUP)

    @property
    def num_chunks(self) -> int:
        return -(-self.num_vectors // (self.num_devices * self.chunk))

    @property
    def rows(self) -> int:
        """R, rows on each device."""
        return self.num_chunks * self.chunk

    def bytes_per_device(self, dim: int, dtype: VectorType) -> int:
        """Memory of a device's shard, in bytes."""
        return self.rows * (dim * jnp.dtype(dtype).itemsize + (4 if dtype == "int8" else 0))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DeviceVectors:
    """Vectors on the devices, their rows split over them."""

    values: jax.Array  # float32, bfloat16 or int8 [n R, D]
    scales: jax.Array | None  # with int8, float32 [n R]: vector r is values[r] * scales[r]


def search_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The devices on one axis, in their order."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def quantise(vectors_RD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [R, D], scales float32 [R]): the nearest multiples of a row's largest magnitude / 127."""
    largest_R = np.abs(vectors_RD).max(axis=1, initial=0.0)
    scales_R = np.where(largest_R > 0, largest_R / 127, 1).astype(np.float32)
    return np.rint(vectors_RD / scales_R[:, None]).astype(np.int8), scales_R


def load_vectors(source: VectorShards, layout: Layout, mesh: Mesh, dtype: VectorType) -> DeviceVectors:
    """Copy the vectors to the devices; a process reads the rows of its own devices only, a device at a time.

    Raises:
        ValueError: a vector that was read is not finite.
    """
    dim = source.shape[1]
    shape, sharding = (layout.num_devices * layout.rows, dim), NamedSharding(mesh, PartitionSpec(AXIS))
    values, scales = [], []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        start = index[0].start or 0
        local_values, local_scales = _read_shard(source, start, layout, dtype)
        values.append(jax.device_put(local_values, device))
        scales.append(jax.device_put(local_scales, device))
    whole = jax.make_array_from_single_device_arrays(shape, sharding, values)
    if dtype != "int8":
        return DeviceVectors(whole, None)
    return DeviceVectors(whole, jax.make_array_from_single_device_arrays(shape[:1], sharding, scales))


def _read_shard(source: VectorShards, start: int, layout: Layout, dtype: VectorType) -> tuple[np.ndarray, np.ndarray]:
    """(values [R, D], scales [R]) of the device that holds the vectors from `start` on."""
    values_RD = np.zeros((layout.rows, source.shape[1]), jnp.dtype(dtype))
    scales_R = np.ones(layout.rows, np.float32)
    end = min(start + layout.rows, layout.num_vectors)
    for first in range(start, end, _READ):
        last = min(first + _READ, end)
        read = np.asarray(source.rows(first, last), np.float32)
        if not np.isfinite(read).all():
            raise ValueError(f"vectors must be finite; one of {first} to {last - 1} is not")
        here = slice(first - start, last - start)
        if dtype == "int8":
            values_RD[here], scales_R[here] = quantise(read)
        else:
            values_RD[here] = read
    return values_RD, scales_R


def make_search(mesh: Mesh, layout: Layout, embed: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """A jitted program of (vectors, params, *queries, k=k): encoding and search in one.

    Every process of the mesh must call it with the same arguments in the same order; `params` and `queries` are
    replicated, and so are the results. It is compiled once for each shape of the queries and each k.

    Args:
        embed: (params, *queries) -> query vectors float32 [B, D]. Traced.

    Returns:
        A function that returns the k vectors with the largest inner products with each query, k <= P, best first,
        equal ones by position: (scores float32 [B, k], positions int32 [B, k], query vectors float32 [B, D]).
        Inner products are of the vectors as they are stored, accumulated in float32; queries are rounded to bfloat16
        where the vectors are bfloat16 or int8.
    """

    def search(vectors: DeviceVectors, params: Any, *queries: jax.Array, k: int) -> tuple[jax.Array, ...]:
        rows, whole = PartitionSpec(AXIS), PartitionSpec()
        is_divided = len(queries[0]) % mesh.size == 0  # each device encodes its part of the queries, or all of them

        def on_device(vectors: DeviceVectors, params: Any, *queries: jax.Array) -> tuple[jax.Array, ...]:
            queries_BD = embed(params, *queries)
            if is_divided:
                queries_BD = jax.lax.all_gather(queries_BD, AXIS, axis=0, tiled=True)
            return *_nearest(vectors, queries_BD, k=k, layout=layout), queries_BD

        given = (rows if is_divided else whole,) * len(queries)
        specs = (rows, whole, *given)
        program = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=(whole,) * 3, check_vma=False)
        return program(vectors, params, *queries)

    return jax.jit(search, static_argnames="k", out_shardings=NamedSharding(mesh, PartitionSpec()))


def _nearest(vectors: DeviceVectors, queries_BD: jax.Array, *, k: int, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """One device's part of the search: top-k of each chunk of its rows, of all chunks, of all devices."""
    first = jax.lax.axis_index(AXIS) * layout.rows
    in_chunks = jax.tree.map(lambda x: x.reshape(layout.num_chunks, layout.chunk, *x.shape[1:]), vectors)

    def search_chunk(number: jax.Array, chunk: DeviceVectors) -> tuple[jax.Array, jax.Array]:
        start = first + number * layout.chunk
        scores_BC = _scores(queries_BD, chunk)
        is_vector_C = start + jnp.arange(layout.chunk) < layout.num_vectors
        scores, columns = _top(jnp.where(is_vector_C, scores_BC, -jnp.inf), min(k, layout.chunk))
        return scores, start + columns

    numbers = jnp.arange(layout.num_chunks)
    if layout.num_chunks == 1:
        found = search_chunk(numbers[0], jax.tree.map(lambda x: x[0], in_chunks))
    else:
        scores_NBk, positions_NBk = jax.lax.map(lambda args: search_chunk(*args), (numbers, in_chunks))
        found = _best(_side_by_side(scores_NBk), _side_by_side(positions_NBk), k)
    scores, positions = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in found)
    return _best(scores, positions, k)


def _side_by_side(x_NBk: jax.Array) -> jax.Array:
    """[N, B, k] -> [B, N k]."""
    return x_NBk.swapaxes(0, 1).reshape(x_NBk.shape[1], -1)


def _scores(queries_BD: jax.Array, chunk: DeviceVectors) -> jax.Array:
    """Inner products of all queries with all vectors of a chunk, float32 [B, C]."""
    dtype = jnp.float32 if chunk.values.dtype == jnp.float32 else jnp.bfloat16
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    scores_BC = jax.lax.dot_general(
        queries_BD.astype(dtype), chunk.values.astype(dtype), (((1,), (1,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
    return scores_BC if chunk.scales is None else scores_BC * chunk.scales


def _top(scores_BC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """(scores, columns), both [B, k], of the largest scores; equal ones by column.

    The k groups with the largest maxima hold them all: a score outside is at most each of the k maxima, and where it
    equals one, stands further right. So only their scores are sorted, instead of all C.
    """
    B, C = scores_BC.shape
    if C // _GROUP <= k or C % _GROUP:
        return jax.lax.top_k(scores_BC, k)
    groups_BGW = scores_BC.reshape(B, -1, _GROUP)
    groups_Bk = jnp.sort(jax.lax.top_k(groups_BGW.max(axis=-1), k)[1], axis=-1)
    candidates_BkW = jnp.take_along_axis(groups_BGW, groups_Bk[:, :, None], axis=1)
    scores_Bk, columns_Bk = jax.lax.top_k(candidates_BkW.reshape(B, -1), k)
    return scores_Bk, jnp.take_along_axis(groups_Bk, columns_Bk // _GROUP, axis=1) * _GROUP + columns_Bk % _GROUP


def _best(scores_BM: jax.Array, positions_BM: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest scores and their positions, equal ones by position."""
    descending, positions = jax.lax.sort((-scores_BM, positions_BM), dimension=1, num_keys=2)
    return -descending[:, :k], positions[:, :k]

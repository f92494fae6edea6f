"""Shardings: the rule table from logical axes to mesh axes, and copying host arrays to a mesh."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

# Logical axis -> mesh axes. A dimension whose size is not divisible by its mesh axes is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # rows of a training batch, slots of the sampler
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
}


def partition_spec(mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The PartitionSpec of an array; `axes` holds the logical axis of each dimension (None: replicated)."""
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = RULES[axis] if axis is not None else ()
        ways = int(np.prod([mesh.shape[a] for a in mesh_axes], dtype=int))
        entries.append(mesh_axes if mesh_axes and size % ways == 0 else None)
    return PartitionSpec(*entries)


def tree_shardings(mesh: Mesh, tree: Any, param_axes: dict[str, tuple[str | None, ...]]) -> Any:
    """Return the NamedSharding of every leaf of a state, looked up by the parameter name in the leaf's path.

    The paths of optimizer moments contain their parameter's name, so moments are sharded like parameters. Leaves
    without a known name (counters, keys, value heads) are replicated.

    Args:
        param_axes: parameter name -> logical axes.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(getattr(p, "key", getattr(p, "name", ""))) for p in path]
        axes = next((param_axes[name] for name in reversed(names) if name in param_axes), None)
        if axes is None or len(axes) != len(leaf.shape):
            return replicated(mesh)
        return NamedSharding(mesh, partition_spec(mesh, axes, leaf.shape))

    return jax.tree_util.tree_map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh, num_rows: int) -> int:
    """Number of devices that the rows of a batch are split over; 1 (replicated) if they do not divide evenly."""
    ways = batch_devices(mesh)
    return ways if num_rows % ways == 0 else 1


def batch_devices(mesh: Mesh) -> int:
    """Number of devices that rows of a batch can be split over: those of (data, fsdp)."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def batch_shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings of a batch: the first dimension of each leaf is split over (data, fsdp), the others are replicated."""
    rest = lambda leaf: ("batch",) + (None,) * (leaf.ndim - 1)  # noqa: E731
    return jax.tree.map(lambda x: NamedSharding(mesh, partition_spec(mesh, rest(x), x.shape)), tree)


def device_put_global(tree: Any, shardings: Any) -> Any:
    """Copy host arrays, which must be equal in all processes, to global arrays with these shardings."""

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, shardings)


def device_put_batch(mesh: Mesh, tree: Any) -> Any:
    """Copy a host batch, which must be equal in all processes, to a mesh with its rows split over (data, fsdp)."""
    return device_put_global(tree, batch_shardings(mesh, tree))

"""Devices: the mesh, the one table from logical axes to mesh axes, and distributed start-up."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from r3rag_jax.config import MeshConfig
from r3rag_jax.errors import UserError

T = TypeVar("T")

# The one rule table. A logical axis that does not divide by its mesh axes is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # rows of a training batch, slots of the sampler
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
}
AXES = ("data", "fsdp", "tensor")


def start_distributed(config: MeshConfig) -> None:
    """Join the other processes; to be called once, before any device is touched.

    TPU pods and Slurm tell the coordinator by themselves; elsewhere the config names it.
    """
    if not config.distributed:
        return
    if config.coordinator:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    else:
        jax.distributed.initialize()


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh (data, fsdp, tensor) over all devices of all processes but the sampler's own, with Auto axes.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices()[: jax.device_count() - config.sampler_devices]
    num_devices = len(devices)
    if num_devices < 1:
        raise UserError(
            f"mesh.sampler_devices must leave one of the {jax.device_count()} devices; got {config.sampler_devices}"
        )
    rest = config.fsdp * config.tensor
    data = num_devices // rest if config.data == -1 else config.data
    if data * rest != num_devices:
        raise UserError(
            f"mesh.data * mesh.fsdp * mesh.tensor must be the number of devices, {num_devices}; "
            f"got {config.data} * {config.fsdp} * {config.tensor}"
        )
    return _mesh((data, config.fsdp, config.tensor), devices)


def make_sampler_mesh(config: MeshConfig, mesh: Mesh) -> Mesh:
    """Where rollouts run: on devices of their own, each with all the weights, or on `mesh` like everything else."""
    num_devices = config.sampler_devices
    return _mesh((num_devices, 1, 1), jax.devices()[-num_devices:]) if num_devices else mesh


def _mesh(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> Mesh:
    return jax.make_mesh(sizes, AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def traced_on(mesh: Mesh, function: Callable[..., T]) -> Callable[..., T]:
    """The function, for `jax.jit`, with the mesh in force: what the compiler cannot split by itself asks for it."""

    @functools.wraps(function)
    def on_mesh(*args: Any, **options: Any) -> T:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **options)

    return on_mesh


def platform() -> str:
    """Of the devices to run on. A mesh in force knows best: it may be a TPU pod's, compiled for on a CPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_several_devices() -> bool:
    """Whether the mesh in force has more than one."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def collectives_race() -> bool:
    """Whether a collective within a loop or a branch may run before or after one outside of it, as chance will have it.

    So it is over several CPU devices: their runtime orders collectives by their launch, and a loop counts as launched
    with its first iteration. Devices that disagree wait for each other for ever.
    """
    return jax.default_backend() == "cpu" and jax.device_count() > 1


def partition_spec(mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """Mesh axes of an array whose dimensions have the given logical axes."""
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = RULES[axis] if axis is not None else ()
        ways = int(np.prod([mesh.shape[a] for a in mesh_axes], dtype=int))
        entries.append(mesh_axes if mesh_axes and size % ways == 0 else None)
    return PartitionSpec(*entries)


def tree_shardings(mesh: Mesh, tree: Any, param_axes: dict[str, tuple[str | None, ...]]) -> Any:
    """NamedSharding of every leaf of a state, by the name of the parameter in its path.

    Optimizer moments carry the path of their parameter, so they are sharded alike; leaves without
    a parameter's name (counters, keys, heads) are replicated.
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
    """Devices that the rows of a batch are split over: 1, each with all of them, where they do not divide."""
    ways = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    return ways if num_rows % ways == 0 else 1


def batch_shardings(mesh: Mesh, tree: Any) -> Any:
    """Rows over (data, fsdp); everything behind the first dimension is whole on each device."""
    rest = lambda leaf: ("batch",) + (None,) * (leaf.ndim - 1)  # noqa: E731
    return jax.tree.map(lambda x: NamedSharding(mesh, partition_spec(mesh, rest(x), x.shape)), tree)


def from_process_0(compute: Callable[[], np.ndarray], length: int) -> np.ndarray:
    """What `compute` gives in process 0, in every process: float32 [length]. All must call.

    Raises:
        Exception: whatever `compute` raises in process 0; the others, who would wait for ever, get a UserError.
    """
    if jax.process_count() == 1:
        return compute()
    told, error = np.zeros(1 + length, np.float32), None  # whether it failed, and the values
    if jax.process_index() == 0:
        try:
            told[1:] = compute()
        except Exception as caught:
            told[0], error = 1, caught
    told = np.asarray(multihost_utils.broadcast_one_to_all(told))
    if error is not None:
        raise error
    if told[0]:
        raise UserError("process 0 has failed; see what it says")
    return told[1:].copy()


def put(tree: Any, shardings: Any) -> Any:
    """Host arrays, equal in every process, to global arrays with these shardings."""

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, shardings)


def put_batch(mesh: Mesh, tree: Any) -> Any:
    """A host batch, equal in every process, to the devices."""
    return put(tree, batch_shardings(mesh, tree))

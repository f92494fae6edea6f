"""The device mesh (data, fsdp, tensor), and what traced code asks of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh

from r3rag_jax.config import MeshConfig
from r3rag_jax.errors import UserError

T = TypeVar("T")
AXES = ("data", "fsdp", "tensor")


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

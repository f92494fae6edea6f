"""The device mesh (data, fsdp, tensor)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from r3rag_jax.config import MeshConfig
from r3rag_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig) -> Mesh:
    """Make the training mesh: all devices of all processes except those reserved for the sampler, with Auto axes.

    Raises:
        UserError: the product of the axis sizes is not the number of devices.
    """
    devices = jax.devices()[: jax.device_count() - config.sampler_devices]
    num_devices = len(devices)
    if num_devices < 1:
        raise UserError(
            f"mesh.sampler_devices must leave one or more of {jax.device_count()} devices; got {config.sampler_devices}"
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
    """Make the mesh for rollouts: the last `sampler_devices` devices, each with all weights, or `mesh` if that is 0."""
    num_devices = config.sampler_devices
    return _mesh((num_devices, 1, 1), jax.devices()[-num_devices:]) if num_devices else mesh


def _mesh(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> Mesh:
    return jax.make_mesh(sizes, AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)

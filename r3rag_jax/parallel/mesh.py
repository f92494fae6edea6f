"""The device mesh (data, fsdp, tensor)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from r3rag_jax.config import MeshConfig
from r3rag_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
Sizes = tuple[int, int, int]  # along AXES


def make_mesh(config: MeshConfig) -> Mesh:
    """Make the training mesh: all devices of all processes except those reserved for the sampler, with Auto axes.

    Raises:
        UserError: the product of the axis sizes is not the number of devices.
    """
    devices = jax.devices()[: num_training_devices(config, jax.device_count())]
    return mesh_of(devices, mesh_sizes(config, len(devices)))


def num_training_devices(config: MeshConfig, num_devices: int) -> int:
    """How many devices the sampler leaves to training.

    Raises:
        UserError: none.
    """
    if config.sampler_devices >= num_devices:
        raise UserError(
            f"mesh.sampler_devices must leave one or more of {num_devices} devices; got {config.sampler_devices}"
        )
    return num_devices - config.sampler_devices


def mesh_sizes(config: MeshConfig, num_devices: int) -> Sizes:
    """The sizes (data, fsdp, tensor) of a training mesh.

    Raises:
        UserError: their product is not the number of devices.
    """
    rest = config.fsdp * config.tensor
    data = num_devices // rest if config.data == -1 else config.data
    if data * rest != num_devices:
        raise UserError(
            f"mesh.data * mesh.fsdp * mesh.tensor must be the number of devices, {num_devices}; "
            f"got {config.data} * {config.fsdp} * {config.tensor}"
        )
    return data, config.fsdp, config.tensor


def make_sampler_mesh(config: MeshConfig, mesh: Mesh) -> Mesh:
    """Make the mesh for rollouts: the last `sampler_devices` devices, each with all weights, or `mesh` if that is 0."""
    num_devices = config.sampler_devices
    return mesh_of(jax.devices()[-num_devices:], (num_devices, 1, 1)) if num_devices else mesh


def mesh_of(devices: Sequence[jax.Device], sizes: Sizes) -> Mesh:
    """Make a mesh of these sizes; the devices need not be of this process."""
    axis_types = (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(sizes, AXES, devices=devices, axis_types=axis_types)
    except NotImplementedError:  # an axis that is a part of a dimension of the TPU's network, e.g. 2 of 4x8
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=axis_types)

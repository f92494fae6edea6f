"""Devices of a topology that this machine does not have: programs are compiled for them, or only counted."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from r3rag_jax.compiling.chips import Topology
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.mesh import AXES, Sizes, mesh_of


@dataclasses.dataclass(frozen=True)
class UnknownDevice:
    """A device for a mesh on which shapes and sizes are computed, and nothing is compiled."""

    id: int
    process_index: int
    platform: str
    device_kind: str


def devices_of(topology: Topology, *, compiles: bool) -> list[Any]:
    """The devices of a topology, in the order of its mesh.

    Args:
        compiles: whether programs are compiled for them, which XLA does for TPUs alone.

    Raises:
        UserError: libtpu, which compiles for TPUs, is not installed, or does not know the topology.
    """
    if not compiles:
        chip = topology.chip
        return [UnknownDevice(i, 0, chip.platform, chip.name) for i in range(topology.num_devices)]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU must have the package libtpu: pip install 'r3rag_jax[tpu]'")
    _set_libtpu_environment(topology)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except Exception as error:  # libtpu's own, of several classes
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"--topology must be one that libtpu knows; got {topology.name} ({reason})") from error


def topology_mesh(devices: Sequence[Any], sizes: Sizes) -> Mesh:
    """The mesh (data, fsdp, tensor) of the devices of a topology."""
    if isinstance(devices[0], UnknownDevice):
        return Mesh(np.array(devices, object).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)
    return mesh_of(devices, sizes)


def _set_libtpu_environment(topology: Topology) -> None:
    """What libtpu reads when it is loaded: not to look for the TPU, which this machine does not have."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ["TPU_ACCELERATOR_TYPE"] = topology.accelerator_type
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling needs no lock on the chips
    for name, value in (("TPU_LOG_DIR", "disabled"), ("TPU_STDERR_LOG_LEVEL", "3"), ("TPU_MIN_LOG_LEVEL", "3")):
        os.environ.setdefault(name, value)

"""`Target`: the platform and mesh that a program is compiled for; a static argument of jitted functions."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jax.sharding import AbstractMesh, Mesh

Platform = Literal["cpu", "gpu", "tpu"]


@dataclasses.dataclass(frozen=True)
class Target:
    """Platform and mesh shape of the devices that run a program, which choose its implementation; hashable.

    The mesh may contain devices that this process does not have, e.g. when a CPU compiles a program for a TPU pod.
    """

    platform: Platform = "cpu"
    mesh: AbstractMesh | None = None  # None: one device
    is_shard: bool = False  # the program is what one device of the mesh does, under `collectives.per_device`

    @classmethod
    def of(cls, mesh: Mesh) -> Target:
        """The target for programs that run on `mesh`."""
        return cls(mesh.devices.flat[0].platform, mesh.abstract_mesh)

    def shard(self) -> Target:
        """The target for what one device of several does; on one device, the target itself."""
        return self if self.is_one_device else dataclasses.replace(self, is_shard=True)

    @property
    def is_cpu(self) -> bool:
        return self.platform == "cpu"

    @property
    def is_one_device(self) -> bool:
        """Whether the program's arrays are on one device: XLA does not partition it."""
        return self.is_shard or self.mesh is None or self.mesh.size == 1

    @property
    def can_branch(self) -> bool:
        """Whether loops and conditionals may contain collectives, or operations that XLA would partition with them.

        On several CPU devices they may not. The runtime orders collectives by launch, and it counts all collectives of
        a loop as launched in the first iteration, so devices may order them differently and deadlock.
        """
        return not self.is_cpu or self.is_one_device

    def ways(self, axis: str) -> int:
        """Number of devices along a mesh axis, if the program is a device's shard; else 1: its arrays are whole."""
        return self.mesh.shape[axis] if self.is_shard and self.mesh is not None else 1


ONE_CPU = Target()

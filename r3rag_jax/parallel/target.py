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

    @classmethod
    def of(cls, mesh: Mesh) -> Target:
        """The target for programs that run on `mesh`."""
        return cls(mesh.devices.flat[0].platform, mesh.abstract_mesh)

    @property
    def is_cpu(self) -> bool:
        return self.platform == "cpu"

    @property
    def is_one_device(self) -> bool:
        return self.mesh is None or self.mesh.size == 1

    @property
    def can_branch(self) -> bool:
        """Whether loops and conditionals may contain collectives.

        On several CPU devices they may not. The runtime orders collectives by launch, and it counts all collectives of
        a loop as launched in the first iteration, so devices may order them differently and deadlock.
        """
        return not self.is_cpu or self.is_one_device


ONE_CPU = Target()

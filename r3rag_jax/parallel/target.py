"""What a program is compiled for: decided once from a mesh, then handed down as a static argument."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jax.sharding import AbstractMesh, Mesh

Platform = Literal["cpu", "gpu", "tpu"]


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices of a program, as far as its form depends on them; hashable, so jitted functions take it as static.

    A mesh may be of devices that this process does not have: a TPU pod's, compiled for on a CPU.
    """

    platform: Platform = "cpu"
    mesh: AbstractMesh | None = None  # None: one device

    @classmethod
    def of(cls, mesh: Mesh) -> Target:
        """The target of everything that runs on `mesh`."""
        return cls(mesh.devices.flat[0].platform, mesh.abstract_mesh)

    @property
    def is_cpu(self) -> bool:
        return self.platform == "cpu"

    @property
    def is_one_device(self) -> bool:
        return self.mesh is None or self.mesh.size == 1

    @property
    def can_branch(self) -> bool:
        """Whether loops and conditionals may hold collectives.

        On several CPU devices they may not: the runtime orders collectives by their launch, and a loop counts as
        launched with its first iteration. Devices that order them differently wait for each other for ever.
        """
        return not self.is_cpu or self.is_one_device


ONE_CPU = Target()

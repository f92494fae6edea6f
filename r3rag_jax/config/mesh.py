"""Section `mesh`: devices and processes."""

from __future__ import annotations

import re
from typing import ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from r3rag_jax.config.section import Section, key, require


class MeshConfig(Section):
    """Devices and processes. Every jitted step runs on a mesh (data, fsdp, tensor)."""

    dotted: ClassVar[str] = "mesh"

    layout: Literal["given", "auto"] = key(
        "given", "`auto`: data, fsdp and tensor are chosen from devices, memory and model, and the choice is explained"
    )
    data: int = key(-1, "size of data parallelism; -1: all devices that the other axes leave", "devices")
    fsdp: int = key(1, "size of parameter sharding (FSDP)", "devices", ge=1)
    tensor: int = key(1, "size of tensor parallelism", "devices", ge=1)
    sampler_devices: int = key(
        0,
        "devices, the last ones, that only sample rollouts while the others train (rl.async_rollouts); 0: all do both",
        "devices",
        ge=0,
    )
    distributed: bool = key(False, "start jax.distributed; its coordinator is detected on TPU pods and Slurm")
    coordinator: str = key("", "host:port of process 0, where it cannot be detected")
    num_processes: int = key(0, "number of processes, with an explicit coordinator", "processes")
    process_id: int = key(-1, "rank of this process, with an explicit coordinator")

    @field_validator("data")
    @classmethod
    def _check_data(cls, size: int) -> int:
        if size != -1 and size < 1:
            raise ValueError(f"must be at least 1, or -1 for what is left; got {size}")
        return size

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        require(
            self.layout == "given" or (self.data, self.fsdp, self.tensor) == (-1, 1, 1),
            "mesh.data, mesh.fsdp and mesh.tensor must be unset when mesh.layout is auto, which chooses them; got "
            f"{self.data}, {self.fsdp} and {self.tensor}",
            "mesh.layout",
            "mesh.data",
            "mesh.fsdp",
            "mesh.tensor",
        )
        return self

    @model_validator(mode="after")
    def _check_processes(self) -> Self:
        require(
            self.sampler_devices == 0 or not self.distributed,
            f"mesh.sampler_devices must be 0 when mesh.distributed is true; got {self.sampler_devices}",
            "mesh.sampler_devices",
            "mesh.distributed",
        )
        if self.coordinator:
            self._check_coordinator()
            return self
        for name, unset in (("num_processes", 0), ("process_id", -1)):
            value = getattr(self, name)
            require(
                value == unset,
                f"mesh.{name} must stay {unset} without a mesh.coordinator; got {value}",
                f"mesh.{name}",
            )
        return self

    def _check_coordinator(self) -> None:
        require(
            self.distributed,
            f"mesh.coordinator must be empty unless mesh.distributed is true; got {self.coordinator!r}",
            "mesh.coordinator",
            "mesh.distributed",
        )
        require(
            re.fullmatch(r"\S+:\d+", self.coordinator) is not None,
            f"mesh.coordinator must be host:port; got {self.coordinator!r}",
            "mesh.coordinator",
        )
        require(
            self.num_processes >= 1,
            f"mesh.num_processes must be at least 1; got {self.num_processes}",
            "mesh.num_processes",
        )
        require(
            0 <= self.process_id < self.num_processes,
            f"mesh.process_id must be in [0, {self.num_processes}), one of mesh.num_processes; got {self.process_id}",
            "mesh.process_id",
            "mesh.num_processes",
        )

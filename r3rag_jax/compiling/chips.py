"""Chips and the topologies that they come in: memory, and the rates that time is estimated from."""

from __future__ import annotations

import dataclasses
import math
import re

from r3rag_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. Rates are peaks of data sheets; a program reaches less."""

    name: str
    platform: str  # of JAX: tpu or gpu
    memory: int  # bytes that programs may use
    flops: float  # bfloat16 operations per second
    hbm_rate: float  # bytes per second
    link_rate: float  # bytes per second, one way: of one ICI link, or of all NVLinks of a GPU
    source: str
    torus: int = 0  # TPU: dimensions of its network
    ring_size: int = 0  # TPU: a dimension of this many chips (or, in 3D, a multiple of it) closes to a ring
    host_rate: float = 0.0  # GPU: bytes per second of its share of the network between hosts, one way


# TPU memory is what XLA's compiler allows a program (its own share is taken off); link rates are the published
# bidirectional rate per chip, over its ports, over the two directions.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", int(15.75 * GIB), 197e12, 819e9, 400e9 / 4 / 2, "cloud.google.com/tpu/docs/v5e", 2, 16),
        Chip("v6e", "tpu", int(31.25 * GIB), 918e12, 1638e9, 800e9 / 4 / 2, "cloud.google.com/tpu/docs/v6e", 2, 16),
        Chip("v5p", "tpu", int(95.74 * GIB), 459e12, 2765e9, 1200e9 / 6 / 2, "cloud.google.com/tpu/docs/v5p", 3, 4),
        Chip(
            # 79.6 GiB, less what CUDA takes and XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 leaves.
            "h100", "gpu", int(0.95 * 79.1 * GIB), 989e12, 3350e9, 450e9, "nvidia.com/en-us/data-center/h100 (SXM)",
            host_rate=50e9,
        ),
    )
}  # fmt: skip
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e"}
# Slices that the cloud names by a number: chips, or for v5p cores, two a chip.
_SLICES_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SLICES_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are connected."""

    chip: Chip
    dims: tuple[int, ...]  # TPU: chips along each dimension of the network; GPU: (hosts, GPUs of a host)

    @property
    def num_devices(self) -> int:
        return math.prod(self.dims)

    @property
    def name(self) -> str:
        """As libtpu and `--topology` take it, e.g. `v5e:8x8`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.dims))}"

    @property
    def accelerator_type(self) -> str:
        """The cloud's name of a TPU slice, e.g. `v5litepod-64`, `v5p-32`."""
        number = self.num_devices * (2 if self.chip.torus == 3 else 1)
        return f"{'v5litepod' if self.chip.name == 'v5e' else self.chip.name}-{number}"

    def link_rate(self, group_size: int) -> float:
        """Bytes per second, one way, that a device of a group can send or receive: a lower bound.

        On a TPU all chips together use the links of every dimension, a smaller group those of one dimension. A chip at
        the end of a dimension that is no ring has one link there, otherwise two. GPUs of one host use NVLink, groups
        across hosts the network cards of a host's GPUs together.
        """
        if self.chip.platform == "gpu":
            hosts, of_host = self.dims
            across = hosts > 1 and group_size > of_host
            return min(self.chip.link_rate, of_host * self.chip.host_rate) if across else self.chip.link_rate
        links = [2 if self._is_ring(size) else 1 for size in self.dims if size > 1]
        return self.chip.link_rate * (sum(links) if group_size == self.num_devices else min(links, default=1))

    def _is_ring(self, size: int) -> bool:
        if self.chip.torus == 2:
            return size == self.chip.ring_size
        return all(dim % self.chip.ring_size == 0 for dim in self.dims) and size >= self.chip.ring_size


def parse_topology(text: str) -> Topology:
    """`v5e:8x8`, the cloud's `v5e-64` or `v5litepod-64`, `v5p-32` (cores), `h100:8` or `h100:2x8` (hosts x GPUs).

    Raises:
        UserError: it is none of these.
    """
    shown = "v5e:8x8, v5e-64, v6e-32, v5p-32, h100:8 or h100:2x8"
    match = re.fullmatch(r"(\w+)(?:(:)([\dx]+)|-(\d+))", text.strip().lower())
    chip = CHIPS.get(_ALIASES.get(match[1], match[1])) if match else None
    if match is None or chip is None:
        raise UserError(f"--topology must be like {shown}; got {text!r}")
    if match[2]:
        dims = tuple(int(size) for size in match[3].split("x") if size)
        dims = (1, *dims) if chip.platform == "gpu" and len(dims) == 1 else dims
    else:
        dims = _dims_of_slice(chip, int(match[4]), text)
    wanted = chip.torus or 2
    if len(dims) != wanted or min(dims) < 1:
        raise UserError(f"--topology of {chip.name} must have {wanted} sizes, like {shown}; got {text!r}")
    return Topology(chip, dims)


def _dims_of_slice(chip: Chip, number: int, text: str) -> tuple[int, ...]:
    if chip.platform == "gpu":
        return (1, number)
    slices = _SLICES_3D if chip.torus == 3 else _SLICES_2D
    cores = 2 if chip.torus == 3 else 1
    if number % cores or number // cores not in slices:
        known = ", ".join(f"{chip.name}-{chips * cores}" for chips in slices)
        raise UserError(f"--topology must be one of {known}, or {chip.name}:AxB with its shape; got {text!r}")
    return tuple(int(size) for size in slices[number // cores].split("x"))

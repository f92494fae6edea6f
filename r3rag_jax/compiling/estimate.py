"""Estimated time of a compiled program from the rates of its chip.

Every operation takes the longer of its products at peak and its HBM traffic at full rate. A synchronous collective
comes on top, an asynchronous one hides behind operations as far as there are any. Real programs are slower: products
do not reach their peak, and the hiding is not perfect.
"""

from __future__ import annotations

import dataclasses

from r3rag_jax.compiling import traffic
from r3rag_jax.compiling.chips import Topology
from r3rag_jax.compiling.hlo import Program
from r3rag_jax.compiling.traffic import Collective
from r3rag_jax.compiling.work import instruction_bytes, instruction_flops


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program on each device."""

    operations_s: float
    sync_collectives_s: float
    async_collectives_s: float

    @property
    def seconds(self) -> float:
        """Operations, and the collectives that nothing hides."""
        return self.sync_collectives_s + max(self.operations_s, self.async_collectives_s)


def estimate(program: Program, found: list[Collective], topology: Topology) -> Estimate:
    """Estimate a program's time; `found` are its collectives."""
    flops: dict[str, float] = {}
    num_bytes: dict[str, float] = {}
    for computation, instruction, place in program.executed():
        if place.fusion is None and traffic.is_collective(instruction):
            continue
        owner = place.fusion or instruction.name
        flops[owner] = flops.get(owner, 0.0) + place.times * instruction_flops(computation, instruction)
        if place.fusion is None:
            moved = place.times * instruction_bytes(program, computation, instruction)
            num_bytes[owner] = num_bytes.get(owner, 0.0) + moved
    chip = topology.chip
    operations = sum(max(flops.get(name, 0.0) / chip.flops, size / chip.hbm_rate) for name, size in num_bytes.items())

    def seconds(items: list[Collective]) -> float:
        return sum(item.wire_bytes / topology.link_rate(item.group_size) for item in items)

    return Estimate(
        operations_s=operations,
        sync_collectives_s=seconds([item for item in found if not item.is_async]),
        async_collectives_s=seconds([item for item in found if item.is_async]),
    )

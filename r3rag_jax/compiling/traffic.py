"""Collectives between devices, and copies of large arrays, that a compiled program runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from r3rag_jax.compiling.hlo import Computation, Instruction, Place, Program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_OPCODES = {kind: kind for kind in KINDS} | {f"{kind}-start": kind for kind in KINDS}
_OPCODES |= {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}
_ASYNC = 'custom_call_target="AsyncCollective'
_ASYNC_START = f'{_ASYNC}Start"'
_FUSED_SCATTER = "all-reduce-scatter"  # TPU: a fusion of an all-reduce and the slice that each device keeps


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective at one place of the program."""

    kind: str  # one of KINDS
    name: str
    num_bytes: int  # of the larger of what goes in and comes out, on one device: the whole array of a gather
    group_size: int  # devices that take part
    times: float  # executions in one run of the program
    loops: tuple[str, ...]  # `while` instructions around it, outermost first
    is_async: bool  # whether other operations may run between its start and its end
    op_name: str  # the JAX operation that it comes from

    @property
    def total_bytes(self) -> float:
        """Bytes over all executions."""
        return self.num_bytes * self.times

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends over all executions, by the ring algorithm."""
        share = (self.group_size - 1) / self.group_size
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.total_bytes * factor


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy or a transpose of an array in HBM at one place of the program."""

    name: str
    num_bytes: int
    times: float
    loops: tuple[str, ...]
    op_name: str

    @property
    def total_bytes(self) -> float:
        """Bytes written over all executions."""
        return self.num_bytes * self.times


@dataclasses.dataclass(frozen=True)
class Total:
    """Collectives of one kind."""

    count: float  # executions
    num_bytes: float
    wire_bytes: float
    count_in_loops: float
    bytes_in_loops: float


def collectives(program: Program) -> list[Collective]:
    """All collectives that run, each once: an asynchronous one is where it starts."""
    found = [item for item in program.executed() if item[1].opcode in _OPCODES]
    wrapped = {name for _, call, _ in program.executed() if call.opcode == "async-start" for name in call.called}
    # On TPU an asynchronous collective is written three times with one channel: in the fusion that starts it, in one
    # that runs beside it, and in the one that ends it. Others may have the same channel, but are in no fusion, or in
    # that of a reduce-scatter.
    starts = {computation.name for computation, _, _ in found if _starts_collective(computation)}
    started = {_channel(instruction) for computation, instruction, _ in found if computation.name in starts} - {None}
    kept = []
    for computation, instruction, place in found:
        is_start = computation.name in starts
        is_alone = place.fusion is None or computation.name.startswith(_FUSED_SCATTER)
        if _channel(instruction) in started and not is_start and not is_alone:
            continue
        is_async = is_start or computation.name in wrapped or instruction.opcode.endswith("-start")
        kept.append(_collective(program, computation, instruction, place, is_async=is_async))
    return kept


def is_collective(instruction: Instruction) -> bool:
    """Whether an instruction is, or starts, a collective."""
    return instruction.opcode in _OPCODES


def hands_on(instruction: Instruction) -> bool:
    """Whether, in a fusion that a collective runs beside, an instruction is a part of it or passes its arrays on."""
    return (
        is_collective(instruction) or instruction.opcode in ("tuple", "parameter") or _ASYNC in instruction.attributes
    )


def totals(found: Iterable[Collective]) -> dict[str, Total]:
    """Sums by kind, for the kinds that there are."""
    by_kind: dict[str, list[Collective]] = {}
    for collective in found:
        by_kind.setdefault(collective.kind, []).append(collective)

    def total(items: list[Collective]) -> Total:
        inside = [item for item in items if item.loops]
        return Total(
            count=sum(item.times for item in items),
            num_bytes=sum(item.total_bytes for item in items),
            wire_bytes=sum(item.wire_bytes for item in items),
            count_in_loops=sum(item.times for item in inside),
            bytes_in_loops=sum(item.total_bytes for item in inside),
        )

    return {kind: total(by_kind[kind]) for kind in KINDS if kind in by_kind}


def copies(program: Program, min_bytes: int) -> list[Copy]:
    """Copies and transposes whose result lies in HBM and has at least `min_bytes`.

    A fusion counts if it holds nothing but a change of layout: copies, transposes, bitcasts and reshapes of one array.
    """
    found = []
    for computation, instruction, place in program.executed():
        if place.fusion is not None or not _is_copy(program, computation, instruction):
            continue
        size = max((array.num_bytes for array in instruction.result if not array.is_on_chip), default=0)
        if size >= min_bytes:
            found.append(Copy(instruction.name, size, place.times, place.loops, instruction.op_name))
    return found


def group_size(attributes: str) -> int:
    """Devices in a group of `replica_groups`: `{{0,1},{2,3}}`, `[2,4]<=[8]` or `mesh['a'=4,'b'=2] {'a'}`; 0: all."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return len(re.findall(r"\{", pairs[1]))
    return 0


def _starts_collective(computation: Computation) -> bool:
    return any(_ASYNC_START in call.attributes for call in computation.of("custom-call"))


def _channel(instruction: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return found[1] if found else None


def _collective(
    program: Program, computation: Computation, instruction: Instruction, place: Place, *, is_async: bool
) -> Collective:
    kind = _OPCODES[instruction.opcode]
    operand_bytes = sum(
        computation.instructions[name].num_bytes for name in instruction.operands if name in computation.instructions
    )
    result = instruction.num_bytes
    if instruction.opcode.endswith("-start") and len(instruction.result) > 1:
        result = max(result - operand_bytes, 0)  # its tuple repeats the operands
    if computation.name.startswith(_FUSED_SCATTER):
        kind = "reduce-scatter"
    return Collective(
        kind=kind,
        name=instruction.name,
        num_bytes=max(operand_bytes, result),
        group_size=group_size(instruction.attributes) or program.num_partitions,
        times=place.times,
        loops=place.loops,
        is_async=is_async,
        op_name=instruction.op_name or _op_name_of_fusion(program, place),
    )


def _op_name_of_fusion(program: Program, place: Place) -> str:
    callers = (c.instructions.get(place.fusion) for c in program.computations.values()) if place.fusion else ()
    return next((caller.op_name for caller in callers if caller is not None), "")


_MOVES = {"copy", "transpose", "bitcast", "reshape", "parameter", "bitcast-convert"}


def _is_copy(program: Program, computation: Computation, instruction: Instruction) -> bool:
    if instruction.opcode in ("copy", "transpose", "copy-start"):
        return not _is_between_memories(computation, instruction)
    if instruction.opcode != "fusion":
        return False
    inside = [program.computations[name] for name in instruction.called if name in program.computations]
    opcodes = {step.opcode for step in _steps(program.computations, inside)}
    return bool(opcodes & {"copy", "transpose"}) and opcodes <= _MOVES


def _is_between_memories(computation: Computation, instruction: Instruction) -> bool:
    """Whether it reads from or writes to a memory other than HBM, as prefetches do."""
    source = computation.instructions.get(instruction.operands[0])
    ends = [*instruction.result[:1], *(source.result[:1] if source else ())]
    return any(array.is_on_chip for array in ends)


def _steps(computations: Mapping[str, Computation], inside: Iterable[Computation]) -> Iterator[Instruction]:
    for computation in inside:
        for step in computation.instructions.values():
            if step.opcode == "fusion":
                yield from _steps(computations, [computations[name] for name in step.called])
            else:
                yield step

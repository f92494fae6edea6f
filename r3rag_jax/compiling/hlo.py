"""Reads the text of a compiled XLA program: its instructions, how often each one runs, and the buffers it touches.

`read(compiled.as_text())` works on the text of XLA for TPU, GPU and CPU. An instruction in a loop counts as often as
the loop runs, which `cost_analysis` does not do. CPU and GPU texts state `known_trip_count`; TPU texts do not, there
the trip count follows from the loop's condition, the step of its counter and the counter's first value.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

ITEM_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-~]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-~]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-~]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array on one device."""

    dtype: str
    dims: tuple[int, ...]
    is_on_chip: bool = False  # in a memory space other than HBM, e.g. VMEM

    @property
    def num_elements(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Its size without padding to tiles."""
        return self.num_elements * ITEM_BITS.get(self.dtype, 0) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    result: tuple[Array, ...]  # one array, or the leaves of a tuple
    operands: tuple[str, ...]  # names of instructions of the same computation; of a constant: its text
    attributes: str  # the rest of the line
    is_root: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the result on one device."""
        return sum(array.num_bytes for array in self.result)

    @property
    def op_name(self) -> str:
        """The JAX operation that it comes from; empty if the text does not say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def named(self, key: str) -> str | None:
        """The computation that the attribute `key` names."""
        found = re.search(rf"\b{key}=%?([\w.\-~]+)", self.attributes)
        return found[1] if found else None

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that run once per execution; those of `while`, reductions and sorts are not among them."""
        if self.opcode not in ("fusion", "call", "conditional", "async-start", "custom-call"):
            return ()
        branches = _BRANCHES.search(self.attributes)
        names = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
        return (*_CALLED.findall(self.attributes), *names)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions, in the order in which they run."""

    name: str
    instructions: Mapping[str, Instruction]  # by name

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(instruction for instruction in self.instructions.values() if instruction.is_root)

    def of(self, opcode: str) -> Iterator[Instruction]:
        """Its instructions of one kind."""
        return (instruction for instruction in self.instructions.values() if instruction.opcode == opcode)

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """Its parameters in order."""
        return tuple(sorted(self.of("parameter"), key=lambda parameter: int(parameter.operands[0])))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a computation runs, for each way from the entry to it."""

    times: float  # executions in one run of the program
    loops: tuple[str, ...]  # the `while` instructions around it, outermost first
    fusion: str | None = None  # the fusion that it belongs to, whose intermediate results are no buffers
    has_unknown_trips: bool = False  # a loop around it has a length that only the run decides


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program of one device."""

    computations: Mapping[str, Computation]
    entry: str
    num_partitions: int = 1  # devices of the program
    unknown_trips: float = 1  # what the outermost loop counts as whose length only the run decides; those in it: 1

    @functools.cached_property
    def places(self) -> Mapping[str, tuple[Place, ...]]:
        """Where each computation runs; one that never runs is not among the keys."""
        found: dict[str, list[Place]] = {}

        def visit(name: str, place: Place) -> None:
            found.setdefault(name, []).append(place)
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                if instruction.opcode == "while":
                    trips = trip_count(self, computation, instruction)
                    guess = 1.0 if place.has_unknown_trips else self.unknown_trips
                    inner = dataclasses.replace(
                        place,
                        times=place.times * (guess if trips is None else trips),
                        loops=(*place.loops, instruction.name),
                        has_unknown_trips=place.has_unknown_trips or trips is None,
                    )
                    visit(instruction.named("body") or "", inner)
                fusion = place.fusion or (instruction.name if instruction.opcode == "fusion" else None)
                for called in instruction.called:
                    if called in self.computations:
                        visit(called, dataclasses.replace(place, fusion=fusion))

        visit(self.entry, Place(1.0, ()))
        return {name: tuple(places) for name, places in found.items()}

    def executed(self) -> Iterator[tuple[Computation, Instruction, Place]]:
        """All instructions that run, also those inside fusions, with each place."""
        for name, places in self.places.items():
            for instruction in self.computations[name].instructions.values():
                for place in places:
                    yield self.computations[name], instruction, place


def read(text: str, *, unknown_trips: float = 1) -> Program:
    """Read `compiled.as_text()`.

    Args:
        unknown_trips: turns of a loop whose length only the run decides.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, instructions = header[2], {}
            entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions)
        elif name and (start := _NAME.match(line)):
            instructions[start[2]] = _instruction(start[2], line[start.end() :], is_root=bool(start[1]))
    partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text)
    if not entry:
        raise ValueError("the text of a compiled program must have an ENTRY computation; got none")
    return Program(computations, entry, int(partitions[1]) if partitions else 1, unknown_trips)


def trip_count(program: Program, caller: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None if that is decided while it runs."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (program.computations[loop.named(key) or ""] for key in ("condition", "body"))
    compare = condition.root
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    counter, limit = (_tuple_index(condition, name) for name in compare.operands)
    if counter is None:
        return None
    first = _element(caller, loop.operands[0], counter)
    if limit is None:
        last = _integer(condition, compare.operands[1])
    else:
        last = _element(caller, loop.operands[0], limit) if _is_kept(body, limit) else None
    step = _step(body, counter)
    if first is None or last is None or not step:
        return None
    return max(0, -(-(last - first) // step))


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape's text, e.g. `(bf16[2,8]{1,0:T(8,128)S(1)}, u32[])`."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(_COMMENT.sub("", shape)):
        sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, is_on_chip="S(" in layout))
    return tuple(found)


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise ValueError(f"an instruction must be a shape and an operation; got {name} = {text[:80]}")
    close = _closing(text, opcode.end() - 1)
    inside = _COMMENT.sub("", text[opcode.end() : close])
    operands = re.findall(r"%([\w.\-~]+)", inside) or [word.strip() for word in inside.split(",") if word.strip()]
    return Instruction(name, opcode[1], arrays(text[:end]), tuple(operands), text[close + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"brackets must close; got {text[:80]}")


def _source(computation: Computation, name: str) -> Instruction | None:
    """The instruction that `name` is a copy of."""
    found = computation.instructions.get(name)
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = computation.instructions.get(found.operands[0])
    return found


def _tuple_index(computation: Computation, name: str) -> int | None:
    """Which element of the computation's tuple `name` is."""
    found = _source(computation, name)
    if found is None or found.opcode != "get-tuple-element":
        return None
    index = re.search(r"index=(\d+)", found.attributes)
    return int(index[1]) if index else None


def _integer(computation: Computation, name: str) -> int | None:
    found = _source(computation, name)
    if found is None or found.opcode != "constant" or not re.fullmatch(r"-?\d+", found.operands[0]):
        return None
    return int(found.operands[0])


def _element(computation: Computation, tuple_name: str, index: int) -> int | None:
    """The integer at an index of a tuple, if it is a constant."""
    found = computation.instructions.get(tuple_name)
    return _integer(computation, found.operands[index]) if found is not None and found.opcode == "tuple" else None


def _is_kept(body: Computation, index: int) -> bool:
    """Whether a loop hands an element of its tuple on as it came."""
    return body.root.opcode == "tuple" and _tuple_index(body, body.root.operands[index]) == index


def _step(body: Computation, counter: int) -> int | None:
    """What a loop adds to an element of its tuple."""
    added = _source(body, body.root.operands[counter]) if body.root.opcode == "tuple" else None
    if added is None or added.opcode != "add" or len(added.operands) != 2:
        return None
    for one, other in (added.operands, added.operands[::-1]):
        if _tuple_index(body, one) == counter:
            return _integer(body, other)
    return None

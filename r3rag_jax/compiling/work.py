"""Floating-point operations and HBM traffic of a compiled program, each instruction times its executions.

Operations are those of matrix products (`dot`, `convolution`, and what a kernel states as its cost): 2 per
multiplication and addition. Traffic is what instructions outside fusions read from and write to HBM; a fusion that only
slices an operand reads the slice, and an update in place writes the update. It is without that of collectives, also of
those that run beside a fusion, which has their arrays among its own.
"""

from __future__ import annotations

import math
import re

import numpy as np

from r3rag_jax.compiling.hlo import Array, Computation, Instruction, Program
from r3rag_jax.compiling.traffic import hands_on, is_collective

# Instructions that move nothing: their result is a view, or belongs to another instruction.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "optimization-barrier", "copy-done", "async-start", "async-update", "async-done",
    "all-gather-done", "all-reduce-done", "collective-permute-done", "send-done", "recv-done", "slice-done",
    "dynamic-slice-done", "dynamic-update-slice-done",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # written in place; which operand is written


def flops(program: Program) -> float:
    """Operations of one run of the program on one device."""
    return sum(
        place.times * instruction_flops(computation, instruction)
        for computation, instruction, place in program.executed()
    )


def hbm_bytes(program: Program) -> float:
    """Bytes that one run of the program reads from and writes to HBM on one device."""
    return sum(
        place.times * instruction_bytes(program, computation, instruction)
        for computation, instruction, place in program.executed()
        if place.fusion is None
    )


def instruction_flops(computation: Computation, instruction: Instruction) -> float:
    """Operations of one execution of a matrix product or kernel; 0 for all other instructions."""
    if instruction.opcode == "dot":
        return _dot_flops(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "custom-call":
        stated = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.attributes)
        return float(stated[1]) if stated else 0.0
    return 0.0


def instruction_bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """HBM traffic of one execution of an instruction that is not inside a fusion."""
    if instruction.opcode in _FREE:
        return 0.0
    inside = program.computations.get(instruction.called[0]) if instruction.opcode == "fusion" else None
    if inside is not None:
        read = sum(
            _read_bytes(program, inside, parameter, computation.instructions.get(name))
            for parameter, name in zip(inside.parameters, instruction.operands, strict=True)
        )
        return read + _written_bytes(inside, instruction)
    operands = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
    if instruction.opcode in ("slice-start", "dynamic-slice-start"):  # its result: operand, slice, what it waits for
        cut = instruction.result[1]
        return float(cut.num_bytes + _in_hbm((cut,)))
    if instruction.opcode in _SLICES:
        return 2.0 * _in_hbm(instruction.result)
    if instruction.opcode in _UPDATES:
        return 2.0 * _in_hbm(operands[_UPDATES[instruction.opcode]].result)
    result = instruction.result[:1] if instruction.opcode.endswith("-start") else instruction.result
    return float(_in_hbm(result) + sum(_in_hbm(operand.result) for operand in operands))


def _in_hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.num_bytes for array in arrays if not array.is_on_chip)


def _read_bytes(program: Program, inside: Computation, parameter: Instruction, operand: Instruction | None) -> float:
    """What a fusion reads of an operand: all of it, or the slices that it takes; nothing of a collective's arrays."""
    whole = _in_hbm(parameter.result if operand is None else operand.result)
    users = [user for user in inside.instructions.values() if parameter.name in user.operands]
    if not whole or (_has_collective(inside) and all(map(hands_on, users))):
        return 0.0
    sliced = _sliced_bytes(program, inside, parameter.name)
    return whole if sliced is None else min(whole, sliced)


def _sliced_bytes(program: Program, inside: Computation, name: str) -> float | None:
    """Bytes of the slices through which alone a computation reads an array; None if it reads the array otherwise."""
    total = 0.0
    for user in inside.instructions.values():
        if name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == name:
            total += user.num_bytes
        elif user.opcode in _UPDATES and user.operands[0] == name:
            continue  # overwritten in place
        elif user.opcode in ("bitcast", "copy", "reshape"):
            if user.is_root or (found := _sliced_bytes(program, inside, user.name)) is None:
                return None
            total += found
        elif user.opcode == "fusion" and user.called[0] in program.computations:
            nested = program.computations[user.called[0]]
            for parameter, operand in zip(nested.parameters, user.operands, strict=True):
                if operand == name:
                    if (found := _sliced_bytes(program, nested, parameter.name)) is None:
                        return None
                    total += found
        else:
            return None
    return total


def _written_bytes(inside: Computation, fusion: Instruction) -> float:
    """What a fusion writes: its results, of an update in place the update; nothing of a collective's arrays."""
    root, has_collective = inside.root, _has_collective(inside)
    if has_collective and root.opcode != "tuple" and hands_on(root):
        return 0.0
    outputs = [inside.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(outputs) != len(fusion.result):
        return _in_hbm(fusion.result)
    total = 0
    for output, array in zip(outputs, fusion.result, strict=True):
        while output.opcode == "bitcast" and output.operands[0] in inside.instructions:
            output = inside.instructions[output.operands[0]]
        if has_collective and hands_on(output):
            continue
        place = _UPDATES.get(output.opcode)
        update = array.num_bytes if place is None else inside.instructions[output.operands[place]].num_bytes
        total += 0 if array.is_on_chip else update
    return total


def _has_collective(inside: Computation) -> bool:
    return any(map(is_collective, inside.instructions.values()))


def _dot_flops(computation: Computation, instruction: Instruction) -> float:
    left = computation.instructions[instruction.operands[0]].result[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    dims = [int(dim) for dim in contracted[1].split(",") if dim] if contracted else []
    return 2.0 * instruction.result[0].num_elements * math.prod(left.dims[dim] for dim in dims)


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """As XLA counts them: positions in padding or between the elements of a dilated input cost nothing.

    On TPU matrix products are convolutions, and a batch of them one over a dilated spatial dimension.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"a convolution must have dim_labels; got {instruction.name}")
    left, out = computation.instructions[instruction.operands[0]].result[0].dims, instruction.result[0].dims
    window = _window(instruction.attributes)
    positions = math.prod(
        _valid_positions(left[labels[1].index(digit)], out[labels[3].index(digit)], window, int(digit))
        for digit in labels[3]
        if digit.isdigit()
    )
    groups = {name: _integer(instruction.attributes, name) for name in ("feature_group_count", "batch_group_count")}
    features = left[labels[1].index("f")] // groups["feature_group_count"] * out[labels[3].index("f")]
    return 2.0 * features * (left[labels[1].index("b")] // groups["batch_group_count"]) * positions


def _integer(attributes: str, name: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", attributes)
    return int(found[1]) if found else 1


def _window(attributes: str) -> dict[str, list[str]]:
    """`window={size=2x1 pad=0_0x1_1}` as {"size": ["2", "1"], "pad": ["0_0", "1_1"]}."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return {key: value.split("x") for key, value in (part.split("=") for part in found[1].split())} if found else {}


def _valid_positions(num_in: int, num_out: int, window: dict[str, list[str]], dim: int) -> int:
    """Pairs of an output position and a kernel position that meet an element of the input."""

    def number(key: str, default: int) -> int:
        return int(window[key][dim]) if key in window else default

    size, stride = number("size", 1), number("stride", 1)
    input_dilation, kernel_dilation = number("lhs_dilate", 1), number("rhs_dilate", 1)
    pad = int(window["pad"][dim].split("_")[0]) if "pad" in window else 0
    out, total = np.arange(num_out) * stride - pad, 0
    for position in range(size):
        index = out + position * kernel_dilation
        inside = (index >= 0) & (index <= (num_in - 1) * input_dilation)
        total += int(np.count_nonzero(inside & (index % input_dilation == 0)))
    return total

"""What a recipe needs on a topology: memory by part and phase, and the collectives, operations and time of programs."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from r3rag_jax.compiling import hlo, traffic, work
from r3rag_jax.compiling.chips import Topology
from r3rag_jax.compiling.estimate import Estimate, estimate
from r3rag_jax.compiling.programs import PHASES, RunPrograms
from r3rag_jax.run.files import write_text
from r3rag_jax.sampler.memory import MemoryPlan

LARGE_COPY = 2**24  # bytes, from which on a copy is listed
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_PROGRAM_NEEDS = re.compile(r"HLO temp\s+([\d.]+)([KMG])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One program on one device. All bytes, operations and seconds are of one run, of decode of one token a row."""

    name: str
    shape: str
    is_compiled: bool  # otherwise calculated
    fits: bool  # XLA found room for it, beside nothing but its own arguments
    compile_s: float
    temporaries: int  # bytes, with outputs that do not take the place of arguments
    arguments: int  # bytes
    looked_up: int  # bytes of them of which only a few rows are read: an embedding table that is not the output matrix
    flops: float
    hbm_bytes: float
    model_flops: float  # that the model needs
    collectives: dict[str, traffic.Total]
    largest_collectives: list[traffic.Collective]
    copies: list[traffic.Copy]  # large ones
    time: Estimate | None
    peak_flops: float  # of the chip
    hbm_rate: float

    @property
    def mfu(self) -> float | None:
        """Operations that the model needs, over those that the chip could do in the estimated time."""
        return None if self.time is None else self.model_flops / (self.time.seconds * self.peak_flops)

    @property
    def hbm_share(self) -> float | None:
        """Bytes of the arguments, each read once, over those that HBM could deliver in the estimated time."""
        if self.time is None:
            return None
        return (self.arguments - self.looked_up) / (self.time.seconds * self.hbm_rate)


@dataclasses.dataclass(frozen=True)
class PhaseReport:
    """The memory of one phase on each device."""

    name: str
    parts: dict[str, int]  # bytes by name; of temporaries the largest
    temporaries_of: str  # the program that needs them
    are_compiled: bool  # whether the temporaries are the compiler's
    limit: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


def compile_program(
    programs: RunPrograms, name: str, topology: Topology, text_directory: Path | None = None
) -> ProgramReport:
    """Compile a program for its mesh and read what XLA made of it, a text that is kept in `text_directory`."""
    program, chip, started = programs.make(name), topology.chip, time.monotonic()
    tokens = programs.config.rollout.decode_chunk if name == "decode" else 1
    common: dict[str, Any] = {
        "name": name, "shape": program.name, "is_compiled": True, "peak_flops": chip.flops, "hbm_rate": chip.hbm_rate,
        "model_flops": programs.model_flops(name) / tokens, "looked_up": programs.looked_up_bytes(name),
    }  # fmt: skip
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = out_of_memory(str(error))
        if used is None:
            raise
        return ProgramReport(
            fits=False, compile_s=time.monotonic() - started, temporaries=used, arguments=0, flops=0.0, hbm_bytes=0.0,
            collectives={}, largest_collectives=[], copies=[], time=None, **common,
        )  # fmt: skip
    took, memory = time.monotonic() - started, compiled.memory_analysis()
    written = compiled.as_text()
    assert memory is not None and written is not None, "XLA's compilers report both"
    if text_directory is not None:
        text_directory.mkdir(parents=True, exist_ok=True)
        write_text(text_directory / f"{name}.txt", written)
    text = hlo.read(written, unknown_trips=_unknown_trips(programs, name))
    found = [dataclasses.replace(item, times=item.times / tokens) for item in traffic.collectives(text)]
    spent = estimate(text, traffic.collectives(text), topology)
    return ProgramReport(
        fits=True,
        compile_s=took,
        temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        flops=work.flops(text) / tokens,
        hbm_bytes=work.hbm_bytes(text) / tokens,
        collectives=traffic.totals(found),
        largest_collectives=sorted(found, key=lambda item: -item.wire_bytes)[:5],
        copies=traffic.copies(text, LARGE_COPY),
        time=Estimate(*(part / tokens for part in dataclasses.astuple(spent))),
        **common,
    )


def out_of_memory(message: str) -> int | None:
    """Temporaries of a program that XLA found no room for, in bytes, from its error; None: the error is another."""
    used = _OUT_OF_MEMORY.search(message)
    if used is None:
        return None
    temporary = _PROGRAM_NEEDS.search(message)
    amount, unit = (temporary or used).groups()[:2]
    return int(float(amount) * _UNITS[unit])


def phase_reports(
    plans: dict[str, list[MemoryPlan]], cache_bytes: int, reports: Sequence[ProgramReport], limit: int
) -> list[PhaseReport]:
    """The memory of each phase: the arrays of its plans, and the largest temporaries of its programs.

    Args:
        plans: by phase, as the start of a run makes them.
        cache_bytes: of the KV cache on one device.
        reports: of those programs that were compiled or calculated; the plans' estimates stand in for others.
        limit: memory of a device.
    """
    by_name = {report.name: report for report in reports}
    found = []
    for phase, planned in plans.items():
        for plan in planned:
            names = {*plan.temporaries, *(name for name in PHASES[phase] if name in by_name and len(planned) == 1)}
            temporaries = {
                name: by_name[name].temporaries if name in by_name else plan.temporaries[name] for name in names
            }
            of = max(temporaries, key=lambda name: temporaries[name])
            cache = {"cache": cache_bytes} if plan.num_slots else {}
            parts = {**plan.array_bytes, **cache, "temporaries": temporaries[of]}
            is_compiled = all(name in by_name and by_name[name].is_compiled for name in names)
            found.append(PhaseReport(phase, parts, of, is_compiled, limit))
    return found


def compile_all(
    programs: RunPrograms,
    names: Sequence[str],
    topology: Topology,
    say: Callable[[str], None],
    text_directory: Path | None = None,
) -> list[ProgramReport]:
    """Compile programs one after the other; `say` hears of each when it begins and ends. See `compile_program`."""
    reports = []
    for name in names:
        say(f"{name}: compiling for {topology.name} …")
        report = compile_program(programs, name, topology, text_directory)
        outcome = "" if report.fits else ", which has no room for it"
        say(f"{name}: {report.shape}, {report.compile_s:.0f} s{outcome}")
        reports.append(report)
    return reports


def _unknown_trips(programs: RunPrograms, name: str) -> float:
    """Turns of a program's loop whose length only the run decides.

    Decode: the tokens of a call. Prefill has two loops over blocks of 512 positions, which together see the context.
    """
    rollout = programs.config.rollout
    return {"decode": rollout.decode_chunk, "prefill": max(1.0, rollout.max_length / 512 / 2)}.get(name, 1)

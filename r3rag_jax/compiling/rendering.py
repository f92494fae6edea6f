"""The report of `python -m r3rag_jax.compile`, as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from r3rag_jax.compiling.chips import GIB, Topology
from r3rag_jax.compiling.report import PhaseReport, ProgramReport

GB = 1e9


def rates_line(topology: Topology) -> str:
    """The rates that time is estimated from."""
    chip, every = topology.chip, topology.link_rate(topology.num_devices)
    return (
        f"{topology.name}, {topology.num_devices} devices. Rates of {chip.name}: {chip.memory / GIB:.2f} GiB for "
        f"programs, {chip.flops / 1e12:.0f} TFLOP/s in bfloat16, HBM {chip.hbm_rate / GB:.0f} GB/s, links of all "
        f"devices together {every / GB:.0f} GB/s one way ({chip.source}); times at these rates are lower bounds"
    )


def memory_table(phases: Sequence[PhaseReport]) -> Table:
    """Memory by part: a row a part, a column a phase."""
    table = Table(title="GiB per device")
    table.add_column("")
    for phase in phases:
        table.add_column(phase.name, justify="right")
    for part in dict.fromkeys(name for phase in phases for name in phase.parts):
        cells = [f"{phase.parts[part] / GIB:.2f}" if part in phase.parts else "" for phase in phases]
        table.add_row(part, *cells)
    marks = [f"of {phase.temporaries_of}, {'compiled' if phase.are_compiled else 'estimated'}" for phase in phases]
    table.add_row("", *marks, end_section=True)
    table.add_row("total", *(f"{phase.total / GIB:.2f}" for phase in phases))
    table.add_row("fits", *(f"{'yes' if phase.fits else 'NO'}, of {phase.limit / GIB:.2f}" for phase in phases))
    return table


def program_table(programs: Sequence[ProgramReport]) -> Table:
    """Operations, traffic, collectives and time: a row a program."""
    table = Table(title="one run on each device (decode: one token of each row)")
    for title in ("", "TFLOP", "HBM GB", "collectives: count, GB", "temp GiB", "estimate", "MFU", "HBM"):
        table.add_column(title, justify="left" if title in ("", "collectives: count, GB") else "right")
    for program in programs:
        how = program.name if program.is_compiled else f"{program.name} (calculated)"
        if program.time is None:
            table.add_row(how, "", "", "no room", f"{program.temporaries / GIB:.2f}", "", "", "")
            continue
        kinds = ", ".join(
            f"{kind} {total.count:.0f}: {total.num_bytes / GB:.3g}" for kind, total in program.collectives.items()
        )
        table.add_row(
            how, f"{program.flops / 1e12:.4g}", f"{program.hbm_bytes / GB:.4g}", kinds or "none",
            f"{program.temporaries / GIB:.2f}", duration(program.time.seconds), f"{program.mfu:.0%}",
            f"{program.hbm_share:.0%}" if program.name == "decode" else "",
        )  # fmt: skip
    return table


def details(programs: Sequence[ProgramReport]) -> Iterator[str]:
    """The largest collectives and copies, a line each."""
    for program in programs:
        for item in program.largest_collectives[:3]:
            place = f"in {len(item.loops)} loop{'s' * (len(item.loops) > 1)}" if item.loops else "outside loops"
            hidden = "asynchronous" if item.is_async else "synchronous"
            yield (
                f"{program.name}: {item.kind} of {item.num_bytes / 1e6:.1f} MB x {item.times:.0f}, {hidden}, {place}, "
                f"over {item.group_size} devices  {item.op_name[-80:]}"
            )
        for copy in program.copies[:3]:
            yield f"{program.name}: copy of {copy.num_bytes / 1e6:.1f} MB x {copy.times:.0f}  {copy.op_name[-80:]}"


def duration(seconds: float) -> str:
    """`1.2 s` or `3.4 ms`."""
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def as_json(
    topology: Topology, phases: Sequence[PhaseReport], programs: Sequence[ProgramReport], nearest: list[str] | None
) -> dict[str, Any]:
    """The whole report: bytes, operations and seconds, without rounding."""

    def program(report: ProgramReport) -> dict[str, Any]:
        found = dataclasses.asdict(report)
        seconds = None if report.time is None else report.time.seconds
        return found | {"seconds": seconds, "mfu": report.mfu, "hbm_share": report.hbm_share}

    return {
        "topology": topology.name,
        "chip": dataclasses.asdict(topology.chip),
        "devices": topology.num_devices,
        "phases": [dataclasses.asdict(phase) | {"total": phase.total, "fits": phase.fits} for phase in phases],
        "programs": [program(report) for report in programs],
        "nearest": nearest,
    }

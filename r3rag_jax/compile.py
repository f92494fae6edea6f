"""Compile a recipe for a TPU topology without a TPU: `python -m r3rag_jax.compile --config R --topology v5e:8x8`.

Says what each chip's memory holds, which collectives run, and how long each program takes at the chip's rates. Exit
status 1: the recipe does not fit; the nearest settings that do are named.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from r3rag_jax.compiling import command, rendering
from r3rag_jax.compiling.chips import parse_topology
from r3rag_jax.config import parse_args
from r3rag_jax.errors import main_guard

DOES_NOT_FIT = 1


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology",
        required=True,
        metavar="T",
        help="v5e:8x8, or the cloud's name v5e-64, v6e-32, v5p-128 (cores); h100:8, h100:2x8 are calculated",
    )
    parser.add_argument("--model-config", default="", metavar="FILE", help="the model's config.json; model.path's")
    parser.add_argument("--programs", default="", metavar="A,B", help="of sft, rl, score, load, prefill, decode; all")
    parser.add_argument("--calculate", action="store_true", help="do not compile: all by arithmetic, in seconds")
    parser.add_argument("--save-text", default="", metavar="DIR", help="keep the text of what XLA compiled")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    description = (__doc__ or "").splitlines()[0]
    config, options = parse_args(argv, prog="python -m r3rag_jax.compile", description=description, extra=_flags)
    command.use_cpu()
    topology = parse_topology(options.topology)
    names = command.chosen_programs(options.programs, config)
    decoder = command.read_architecture(config, options.model_config)
    progress, console = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 140)
    say = functools.partial(progress.print, highlight=False)
    kept = Path(options.save_text) if options.save_text else None
    outcome = command.run(config, topology, decoder, names, say, only_calculates=options.calculate, text_directory=kept)
    if options.json:
        print(json.dumps(rendering.as_json(topology, outcome.phases, outcome.programs, outcome.nearest), indent=1))
        return 0 if outcome.fits else DOES_NOT_FIT
    console.print(rendering.rates_line(topology), highlight=False)
    console.print(rendering.memory_table(outcome.phases), rendering.program_table(outcome.programs))
    for line in rendering.details(outcome.programs):
        console.print(line, highlight=False, markup=False)
    if outcome.fits:
        return 0
    found = " ".join(outcome.nearest or ()) or "none was found; take more devices, or adapters (lora.rank)"
    print(f"does not fit {topology.name}; nearest setting that does, by arithmetic: {found}", file=sys.stderr)
    return DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())

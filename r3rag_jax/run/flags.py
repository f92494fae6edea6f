"""The command line of `python -m r3rag_jax.train`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from r3rag_jax.config import Config, parse_args
from r3rag_jax.config.world import MAX_SEED
from r3rag_jax.errors import UserError
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.store import is_remote


def parse_training(argv: Sequence[str] | None, prog: str, doc: str) -> list[Config]:
    """The configurations of the runs that a command line asks for: one, or one for each of `--seeds`.

    `doc`: text whose first line describes the program.

    Raises:
        UserError: `--seeds` is no list of different numbers.
    """

    def add_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--profile", type=int, metavar="N", help="write a JAX profile of RL iteration N, from 0")
        parser.add_argument(
            "--seeds", metavar="N,N", help="a run for each of these seeds, one after the other, and their table"
        )

    config, options = parse_args(argv, prog=prog, description=doc.splitlines()[0], extra=add_flags)
    if options.profile is not None:
        config = config.replace(log=config.log.replace(profile=options.profile))
    return [config] if options.seeds is None else of_seeds(config, _read_seeds(options.seeds))


def of_seeds(config: Config, seeds: Sequence[int]) -> list[Config]:
    """The run of each seed: `<name>-seed_<n>`, or `<run_dir>-seed_<n>`, searching the index that the first one builds.

    In buckets each builds its own.
    """

    def of(seed: int) -> Config:
        place = f"{config.run_dir.rstrip('/')}-seed_{seed}" if config.run_dir else ""
        return config.replace(seed=seed, name=f"{config.name}-seed_{seed}", run_dir=place)

    first, *others = map(of, seeds)
    if config.retrieval.kind != "http" and not config.retrieval.index_dir and not is_remote(first.run_dir):
        index = str(RunDirectory.at(first.run_directory).index)
        others = [other.replace(retrieval=other.retrieval.replace(index_dir=index)) for other in others]
    return [first, *others]


def _read_seeds(text: str) -> list[int]:
    """`0,1,2` as numbers."""
    seeds = [int(word) for word in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else []
    if not seeds or len(set(seeds)) < len(seeds) or max(seeds) > MAX_SEED:
        raise UserError(f"--seeds must be different numbers up to {MAX_SEED} with commas, e.g. 0,1,2; got {text!r}")
    return seeds

"""A profile of one RL iteration, written by JAX's profiler."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from r3rag_jax.config import Config, parse_args


def parse_with_profile(argv: Sequence[str] | None, prog: str, doc: str) -> Config:
    """The configuration of a training: `parse_args`, and `--profile N` as short for `log.profile=N`.

    `doc`: text whose first line describes the program.
    """

    def add_flag(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--profile", type=int, metavar="N", help="write a JAX profile of RL iteration N, from 0")

    config, options = parse_args(argv, prog=prog, description=doc.splitlines()[0], extra=add_flag)
    if options.profile is None:
        return config
    return config.replace(log=config.log.replace(profile=options.profile))


@contextlib.contextmanager
def profiled(directory: Path, is_wanted: bool) -> Iterator[None]:
    """Profile the block into `directory`, where that is wanted; every process writes its own file there."""
    if not is_wanted:
        yield
        return
    with jax.profiler.trace(str(directory)):
        yield

"""Build an index that many runs can share, measure it, check it, or plan it.

    python -m r3rag_jax.index build --corpus FILE… --out DIR [--encoder DIR] [--kind KIND] [--memory GIB]
                                    [--vectors FILE… | --faiss FILE] [--config RECIPE] [key=value …]
    python -m r3rag_jax.index eval --index DIR [--questions FILE] [--trajectories FILE] [-k K …] [key=value …]
    python -m r3rag_jax.index check --index DIR
    python -m r3rag_jax.index plan --passages N --dim D [--kind KIND] [--memory GIB] [key=value …]

Runs use an index with `retrieval.index_dir=DIR` and the same `retrieval` keys. FILE of a build holds passages.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from r3rag_jax.config import FlagParser
from r3rag_jax.errors import main_guard
from r3rag_jax.retrieval import commands
from r3rag_jax.run.caches import use_compile_cache

ACTIONS = {"build": commands.build, "eval": commands.evaluate, "check": commands.check, "plan": commands.plan}


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    action = next((word for word in words if word in ACTIONS), "")
    raw = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(prog="python -m r3rag_jax.index", description=__doc__, formatter_class=raw)
    parser.add_argument("action", choices=tuple(ACTIONS), help="what is done; `ACTION --help` lists its flags")
    if action:
        add_flags(parser, action)
    keys = [word for word in words if word.startswith(("retrieval.", "data.")) and "=" in word]
    args = parser.parse_intermixed_args(
        [word for word in words if word not in keys]
    )  # a list of files ends before a key
    args.overrides = [*keys, *(args.overrides if action else ())]
    use_compile_cache()
    ACTIONS[args.action](args, Console())
    return 0


def add_flags(parser: argparse.ArgumentParser, action: str) -> None:
    """The flags of one action."""
    add = parser.add_argument
    if action == "build":
        add("--corpus", type=Path, metavar="FILE", nargs="+", required=True, help="passages {id, contents}")
        add("--out", type=Path, metavar="DIR", required=True, help="directory of the index")
        add("--vectors", type=Path, metavar="FILE", nargs="+", default=(), help=".npy [n, D] of the passages, in order")
        add("--faiss", type=Path, metavar="FILE", help="a FAISS index of the passages that was built elsewhere")
    if action in ("build", "plan"):
        add("--kind", choices=commands.KINDS, help="sets retrieval.kind, retrieval.faiss.kind, retrieval.vector_dtype")
        add("--memory", type=float, metavar="GIB", help="sets retrieval.memory_gb, for the build and for `auto`")
        add("--encoder", metavar="DIR", help="a BERT encoder's Hugging Face directory, or package:NAME")
    if action == "plan":
        add("--passages", type=int, metavar="N", required=True, help="vectors of the index")
        add("--dim", type=int, metavar="D", required=True, help="their size in floats")
    if action in ("eval", "check"):
        add("--index", type=Path, metavar="DIR", required=True, help="what `build` has written")
    if action == "eval":
        add("--questions", type=Path, metavar="FILE", help="questions with metadata.supporting_ids")
        add("--trajectories", type=Path, metavar="FILE", help="trajectories with query and passage_ids in their steps")
        add("-k", type=int, nargs="+", default=[5, 10], help="depths; default: 5 10")
    add("--config", metavar="RECIPE", help="a YAML recipe; only `retrieval` and data.on_error are used")
    add("overrides", nargs="*", metavar="key=value", help="keys of section `retrieval`, and data.on_error, to change")


if __name__ == "__main__":
    sys.exit(main())

"""Make the trajectories that the cold start learns from, by a teacher or from gold decompositions.

    python -m r3rag_jax.coldstart --config RECIPE [key=value …]
    python -m r3rag_jax.coldstart check --config RECIPE [--trajectories FILE] [key=value …]
    python -m r3rag_jax.coldstart import FILE OUT [--corpus FILE] [--on-error skip]
    python -m r3rag_jax.coldstart export FILE OUT [--corpus FILE] [--top-k K] [--on-error skip]

The first command asks the questions of `coldstart.questions`, and goes on where it was stopped or killed. `check` plays
finished trajectories against the live retriever. `import` and `export` read and write the instruction format of the
released R3-RAG-ColdStartTrainingData.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from r3rag_jax.coldstart import instructions
from r3rag_jax.coldstart.commands import JOURNAL, Parts, build, check, check_config
from r3rag_jax.coldstart.journal import open_journal
from r3rag_jax.components import Components
from r3rag_jax.config import parse_args
from r3rag_jax.config.coldstart import TRAJECTORIES
from r3rag_jax.errors import main_guard
from r3rag_jax.run.caches import use_compile_cache

# A cold start trains nothing, and its trajectories are not there yet.
FIXED = ("phases=index", "data.refresh_retrieved=false")


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["import"], ["export"]):
        instructions.run(words[0], words[1:], print)
        return 0
    is_check, fixed = words[:1] == ["check"], () if "--help" in words else FIXED
    config, args = parse_args(
        [*words[is_check:], *fixed], prog="python -m r3rag_jax.coldstart", description=__doc__ or "", extra=add_flags
    )  # fmt: skip
    use_compile_cache()
    directory = config.coldstart_directory
    c = Components(config, directory)
    if is_check:
        return int(check(parts_of(c, directory), args.trajectories or directory / TRAJECTORIES) > 0)
    check_config(config)
    _ = c.codec  # a model that cannot be used is reported before an index is built
    with c.stop, open_journal(directory / JOURNAL, c.on_error.say) as journal:
        parts = parts_of(c, directory)
        build(parts, c.read_questions(questions_of(c), "r3rag"), journal)
    return 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags besides `--config`."""
    parser.add_argument("--trajectories", type=Path, metavar="FILE", help="of check; default: those that were built")


def questions_of(c: Components) -> str | Path:
    """The file of questions to ask, or `NAME:FILE`."""
    config, data = c.config.coldstart, c.config.data
    is_own = data.source == "world"
    return config.question_source(data) or (c.dataset.path_of("rl") if is_own else data.source_of("rl"))


def parts_of(c: Components, directory: Path) -> Parts:
    """The parts of a configuration, with the index of its corpus, which is built unless it is there."""
    is_local = c.config.retrieval.kind != "http"
    c.open_corpus(None, builds_index=is_local)
    return Parts(
        config=c.config, directory=directory, codec=c.codec, search_env=c.search_env, dataset=c.dataset,
        retriever=c.retriever, corpus=c.corpus if is_local else None, mesh=c.sampler_mesh,
        console=c.console, open_judge=lambda: c.judge,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

"""What `python -m r3rag_jax.index` does: build, eval, check, plan."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from r3rag_jax.config import Config, load_config
from r3rag_jax.data.questions import iterate_passages
from r3rag_jax.data.records import OnError
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import GivenFiles
from r3rag_jax.retrieval.factory import build_index, open_local_retriever
from r3rag_jax.retrieval.faiss import FaissRetriever
from r3rag_jax.retrieval.manifest import check_files, has_index, read_manifest
from r3rag_jax.retrieval.planner import describe, plan_faiss
from r3rag_jax.retrieval.quality import against_exact, measure, read_queries, read_trajectory_queries, search_all
from r3rag_jax.run.progress import bar_of_unknown_length
from r3rag_jax.types import Passage

KINDS = ("flat", "flat_fp16", "hnsw", "ivfpq", "auto", "bm25", "hybrid", "device")
_NOT_OF_AN_INDEX = "only keys of section retrieval and data.on_error describe an index; got {!r}"


def build(args: argparse.Namespace, console: Console) -> None:
    """Build an index from files of passages.

    Raises:
        UserError: a flag, a key, or a line of a file is wrong.
    """
    out: Path = args.out
    if out.exists() and not has_index(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out must be a new or empty directory, or an index to replace; got {out}")
    config = _load(args, flag_overrides(args))
    on_error = OnError.of(config.data, console)

    def passages() -> Iterator[Passage]:
        for path in args.corpus:
            yield from iterate_passages(path, on_error)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    given = GivenFiles(tuple(args.vectors), args.faiss)
    with bar_of_unknown_length("index", console=console, live=config.log.progress) as on_progress:
        build_index(config.retrieval, passages(), out, on_progress, given, say)
    manifest = read_manifest(out)
    print(f"{out}: {manifest.num_passages} passages, {manifest.kind}, corpus {manifest.corpus[:16]}")


def flag_overrides(args: argparse.Namespace) -> list[str]:
    """The keys that the flags --encoder, --kind and --memory stand for."""
    overrides = []
    if args.encoder:
        overrides += ["retrieval.encoder.kind=bert", f"retrieval.encoder.path={args.encoder}"]
    if args.kind in ("bm25", "hybrid", "device"):
        overrides += [f"retrieval.kind={args.kind}"]
    elif args.kind == "flat_fp16":
        overrides += ["retrieval.kind=faiss", "retrieval.faiss.kind=flat", "retrieval.vector_dtype=float16"]
    elif args.kind:
        overrides += ["retrieval.kind=faiss", f"retrieval.faiss.kind={args.kind}"]
    if args.memory is not None:
        overrides += [f"retrieval.memory_gb={args.memory}"]
    return overrides


def evaluate(args: argparse.Namespace, console: Console) -> None:
    """Print recall and nDCG of an index, against supporting passages and against exact search.

    Raises:
        UserError: the index cannot be opened, or a file names no supporting passages.
    """
    queries = read_queries(args.questions) if args.questions else {}
    if args.trajectories:
        queries |= {"queries of the trajectories": read_trajectory_queries(args.trajectories)}
    if not queries:
        raise UserError("eval needs --questions FILE or --trajectories FILE; got neither")
    config = _load(args, [] if args.config else read_manifest(args.index).overrides()).retrieval
    retriever = open_local_retriever(config, args.index)
    exact = retriever.exact() if isinstance(retriever, FaissRetriever) else None
    ks = sorted(set(args.k))
    table = Table("queries", "number", "against", *(f"{name}@{k}" for k in ks for name in ("recall", "all", "ndcg")))
    table.add_column("ms/query")
    for name, items in queries.items():
        texts = [query.text for query in items]
        search_all(retriever, texts[:64], ks[-1])  # compiles the encoder, reads the index
        began = time.perf_counter()
        found = search_all(retriever, texts, ks[-1])
        ms = 1e3 * (time.perf_counter() - began) / len(texts)
        rows = {"supporting passages": measure(found, [query.relevant for query in items], ks)}
        if exact is not None:
            rows["exact search"] = against_exact(found, search_all(exact, texts, ks[-1]), ks)
        for against, metrics in rows.items():
            cells = [metrics.get(f"{metric}@{k}") for k in ks for metric in ("recall", "all", "ndcg")]
            shown = ["" if cell is None else f"{cell:.3f}" for cell in cells]
            table.add_row(name, str(len(texts)), against, *shown, f"{ms:.2f}")
    console.print(table)


def check(args: argparse.Namespace, console: Console) -> None:
    """Compare every byte of an index with what was built.

    Raises:
        UserError: a file is missing or damaged; the message names it.
    """
    manifest = read_manifest(args.index)
    check_files(args.index, manifest, manifest.files, reads_all=True)
    console.print(f"{args.index}: {len(manifest.files)} files are as they were built", highlight=False, soft_wrap=True)


def plan(args: argparse.Namespace, console: Console) -> None:
    """Say what an index of so many vectors would take."""
    config = _load(args, flag_overrides(args)).retrieval
    say = plan_faiss(config, args.passages, args.dim)
    console.print(describe(say, args.passages, args.dim), highlight=False, soft_wrap=True)


def _load(args: argparse.Namespace, keys: Sequence[str]) -> Config:
    """The configuration of the recipe, the keys that flags stand for, and the overrides, which have the last word."""
    for override in args.overrides:
        if not override.startswith(("retrieval.", "data.on_error=")):
            raise UserError(_NOT_OF_AN_INDEX.format(override))
    # With the phase `index` alone, the other phases' requirements of a recipe are not checked.
    return load_config(args.config, [*keys, *args.overrides, "phases=index"])

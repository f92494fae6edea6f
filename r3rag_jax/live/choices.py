"""What a demo lets people choose from: the policies of a run, and the indexes beside its own."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from r3rag_jax.config import Config, load_config
from r3rag_jax.evaluation.checkpoint import Checkpoint
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.live.player import RetrieverChoice
from r3rag_jax.models.hf.conversion import POLICY_PHASES
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.retrieval.factory import open_local_retriever
from r3rag_jax.retrieval.manifest import has_index, read_manifest
from r3rag_jax.run.directory import RunDirectory

TITLES = {system.policy: system.title for system in SYSTEMS.values()}


def with_index(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of a checkpoint: a model without passages of its own searches the first `--index`."""
    is_run = RunDirectory.at(args.checkpoint).config_file.is_file()
    if is_run or not args.index or args.corpus is not None or args.config is not None:
        return args
    words = [*read_manifest(args.index[0]).overrides(), f"retrieval.index_dir={args.index[0]}", *args.overrides]
    return argparse.Namespace(**vars(args) | {"overrides": words, "index": args.index[1:]})


def policies_of(checkpoint: Checkpoint, phase: str | None) -> Mapping[str, str]:
    """The policies that may be chosen, name -> title: that of `phase`, or all of a run, the one trained last first.

    Raises:
        UserError: the phase has not finished, or none has.
    """
    chosen = checkpoint.choose_policy(phase)
    if checkpoint.config.rollout.server.is_given:
        return {"server": "Inference server"}
    if not checkpoint.is_run:
        return {chosen: "Model"}
    names = [chosen] if phase else [name for name in POLICY_PHASES if checkpoint.run.policy(name).exists()]
    return {name: TITLES.get(name, name) for name in names}


def retrievers_of(
    config: Config, index_dir: Path, open_own: Callable[[], Retriever], others: Iterable[Path]
) -> Mapping[str, RetrieverChoice]:
    """The retrievers that may be chosen, by name: those of other indexes, then the checkpoint's own, if it has one.

    Raises:
        UserError: an index cannot be read.
    """
    found: dict[str, RetrieverChoice] = {}
    for directory in others:
        manifest = read_manifest(directory)
        retrieval = load_config(None, [*manifest.overrides(), "phases=index"]).retrieval
        open_it = functools.partial(open_local_retriever, retrieval, directory)
        name = _unique(directory.resolve().name, found)
        found[name] = RetrieverChoice(f"{name} ({manifest.kind}, {manifest.num_passages:,} passages)", open_it)
    kind, has_own = config.retrieval.kind, has_index(index_dir)
    if found and not has_own and kind != "http":
        return found
    size = f", {read_manifest(index_dir).num_passages:,} passages" if has_own and kind != "http" else ""
    return found | {_unique("own", found): RetrieverChoice(f"{kind}{size}", open_own)}


def _unique(name: str, taken: Mapping[str, object]) -> str:
    number = 2
    found = name
    while found in taken:
        found, number = f"{name}-{number}", number + 1
    return found

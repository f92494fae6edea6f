"""Builds an index directory: passages, what a kind of retriever adds to them, and the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from r3rag_jax.retrieval.manifest import replaced_directory, write_manifest
from r3rag_jax.retrieval.store import PassageStore, write_store
from r3rag_jax.types import Passage

# Writes the files of a kind of retriever beside a store, in its directory; returns what else the index depends on.
WriteFiles = Callable[[PassageStore, Path], Mapping[str, str]]


def write_index(directory: Path, kind: str, passages: Iterable[Passage], write_files: WriteFiles) -> None:
    """Write an index directory whole or not at all; an index that was there is replaced.

    Raises:
        UserError: there are no passages, two have the same id, or `write_files` raised it.
    """
    with replaced_directory(directory) as new:
        corpus = write_store(new, passages)
        store = PassageStore(new)
        depends_on = write_files(store, new)
        write_manifest(new, kind, len(store), corpus, depends_on)

"""The retrievers by name: the one place that chooses one, for reading and for building its index."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.models.paths import PREFIX
from r3rag_jax.retrieval.base import BuildOptions, Encoder, GivenFiles, OnProgress, Retriever
from r3rag_jax.retrieval.bm25 import BM25Retriever
from r3rag_jax.retrieval.broadcast import BroadcastRetriever
from r3rag_jax.retrieval.builder import write_index
from r3rag_jax.retrieval.device import DeviceRetriever
from r3rag_jax.retrieval.encoders.factory import open_encoder
from r3rag_jax.retrieval.faiss import FaissRetriever
from r3rag_jax.retrieval.http import HttpRetriever
from r3rag_jax.retrieval.hybrid import HybridRetriever
from r3rag_jax.retrieval.milvus import MilvusRetriever
from r3rag_jax.retrieval.nearest import search_mesh
from r3rag_jax.retrieval.store import PassageStore, open_store
from r3rag_jax.types import Passage

__all__ = [
    "RETRIEVERS",
    "RetrieverKind",
    "build_index",
    "open_encoder",
    "open_local_retriever",
    "open_retriever",
    "open_store",
]


class RetrieverKind(Protocol):
    """What a class in RETRIEVERS has besides the members of a Retriever."""

    def open(self, config: RetrievalConfig, index_dir: Path, encoder: Callable[[], Encoder] | None = None) -> Retriever:
        """A retriever over an index directory; the arguments are those of `open_retriever`.

        Raises:
            UserError: the index, or what else the retriever needs, cannot be used.
        """
        ...

    def write_files(
        self,
        config: RetrievalConfig,
        store: PassageStore,
        directory: Path,
        options: BuildOptions,
    ) -> Mapping[str, str]:
        """Write what the index holds besides the passages; returns name -> fingerprint of what it depends on."""
        ...


# `retrieval.kind` -> class.
RETRIEVERS: dict[str, RetrieverKind] = {
    "faiss": FaissRetriever,
    "bm25": BM25Retriever,
    "hybrid": HybridRetriever,
    "device": DeviceRetriever,
    "http": HttpRetriever,
    "milvus": MilvusRetriever,
}
WITH_VECTORS = ("faiss", "hybrid", "device")  # whose `write_files` takes given files


def open_retriever(
    config: RetrievalConfig, index_dir: str | Path, encoder: Callable[[], Encoder] | None = None
) -> Retriever:
    """The retriever of the configuration; with several processes all must open it and make the same searches.

    The devices of all processes search together; any other retriever searches on process 0 for all.

    Args:
        config: section `retrieval`.
        index_dir: directory that `build_index` wrote.
        encoder: returns what `open_encoder` opened for this index, so that its weights are not loaded again; called
            only by retrievers with an encoder. By default it is opened.

    Raises:
        UserError: the index is missing, damaged, or was built with other settings.
    """
    if config.kind == "device":
        return DeviceRetriever.open(config, Path(index_dir), encoder, mesh=search_mesh(jax.devices()))
    open_it = functools.partial(open_local_retriever, config, index_dir, encoder)
    return open_it() if jax.process_count() == 1 else BroadcastRetriever(open_it)


def open_local_retriever(
    config: RetrievalConfig, index_dir: str | Path, encoder: Callable[[], Encoder] | None = None
) -> Retriever:
    """As `open_retriever`, for one process alone: the other processes neither open it nor search."""
    return RETRIEVERS[config.kind].open(config, Path(index_dir), encoder)


def build_index(
    config: RetrievalConfig,
    passages: Iterable[Passage],
    index_dir: str | Path,
    on_progress: OnProgress | None = None,
    given: GivenFiles | None = None,
    say: Callable[[str], None] | None = None,
    spread: Callable[[Encoder], Encoder] = lambda encoder: encoder,
) -> None:
    """Write the index of the configuration into a directory, whole or not at all; an index that was there is replaced.

    A build that was killed is continued by the next one of the same configuration and passages: vectors and graphs that
    are finished are kept.

    Args:
        config: section `retrieval`.
        passages: the corpus, of different ids; one passage at a time is held in memory.
        index_dir: directory that appears when the index is complete.
        on_progress: called with the passages newly done, the passages in all and, after the first, the stage.
        given: vectors or a FAISS index that are not to be computed.
        say: told what the index will take, before vectors are computed.
        spread: makes the encoder one of all processes, see `encoders/spread.py`.

    Raises:
        UserError: there are no passages, two have the same id, the encoder cannot be read, or what is given does not
            fit.
    """
    if given not in (None, GivenFiles()) and config.kind not in WITH_VECTORS:
        raise UserError(
            f"vectors are given to an index of one of {', '.join(WITH_VECTORS)}; got retrieval.kind={config.kind}"
        )
    options = BuildOptions(on_progress, say, given or GivenFiles(), spread)

    def write_files(store: PassageStore, directory: Path) -> Mapping[str, str]:
        return RETRIEVERS[config.kind].write_files(config, store, directory, options)

    write_index(Path(index_dir), config.kind, passages, write_files, recipe_of(config))


def recipe_of(config: RetrievalConfig) -> dict[str, Any]:
    """The keys of `retrieval` that say how an index is opened again, as JSON values; a path becomes absolute."""
    recipe = config.model_dump(mode="json", include={"kind", "vector_dtype", "encoder", "faiss", "hybrid", "milvus"})
    path = recipe["encoder"]["path"]
    if path and not path.startswith(PREFIX):
        recipe["encoder"]["path"] = str(Path(path).absolute())
    if (file := recipe["milvus"]["uri"]).endswith(".db"):
        recipe["milvus"]["uri"] = str(Path(file).absolute())
    return recipe

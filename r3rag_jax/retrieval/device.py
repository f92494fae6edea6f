"""Exact dense retrieval on the devices: the query encoder and the search are one program over all devices.

The passages' vectors lie in the devices' memory, split over all of them; passages and, for re-scoring, vectors are read
from the index's memory-mapped files. With several processes every process opens the index, reads the vectors of its own
devices, and makes the same searches, so that nothing is sent between the hosts: the devices gather k candidates of each
device, and every process finds the same hits.

Device programs of several processes must start in the same order everywhere. So, with more than one process, only the
thread that opened the retriever may search; the configuration refuses what would search in another one. A process whose
search fails ends, and with it all others (`parallel/processes.joined`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.processes import check_same
from r3rag_jax.parallel.shardings import device_put_global, replicated
from r3rag_jax.retrieval.base import BuildOptions, Encoder
from r3rag_jax.retrieval.encoders.factory import new_encoder, open_encoder
from r3rag_jax.retrieval.encoders.traced import Inputs, TracedEncoder
from r3rag_jax.retrieval.encoding import copy_vectors, encode, encode_passages
from r3rag_jax.retrieval.fingerprint import digest
from r3rag_jax.retrieval.manifest import AGAIN, check_files, read_manifest
from r3rag_jax.retrieval.nearest import Layout, VectorType, load_vectors, make_search, search_mesh
from r3rag_jax.retrieval.ranked import RankedRetriever, Ranking
from r3rag_jax.retrieval.store import PassageStore
from r3rag_jax.retrieval.vectors import VectorShards
from r3rag_jax.types import Passage

KINDS = ("device", "faiss")  # kinds of an index whose files can be searched on the devices
_ROWS = (4, 16, 64, 256)  # queries of a program: a batch is filled up to the next size
_MIN_FOUND = 16  # passages that a program finds per query; more are rounded up to a power of two


class DeviceRetriever(RankedRetriever):
    """Searches vectors in the memory of all devices for the largest inner products."""

    def __init__(
        self,
        encoder: Encoder,
        passage_at: Callable[[int], Passage],
        vectors: VectorShards,
        corpus: str,
        *,
        mesh: Mesh,
        dtype: VectorType = "bfloat16",
        candidates: int = 4,
        cached_queries: int = 0,
    ) -> None:
        """
        Args:
            encoder: what the passages were encoded with; it encodes the queries, on the devices if it is a
                `TracedEncoder`.
            passage_at: position in [0, P) -> passage; equal scores are ranked by position.
            vectors: of the passages [P, D].
            corpus: fingerprint of the passages.
            mesh: the devices that search, see `search_mesh`. If they are of several processes, all must make the same
                searches in the same order.
            dtype: of the vectors in the devices' memory.
            candidates: passages per hit that the devices find, and whose inner products with `vectors` rank them; 0:
                the devices' own scores do.
            cached_queries: see `RankedRetriever`.

        Raises:
            UserError: the vectors are not of the encoder's size, are not finite, or do not fit the devices.
        """
        super().__init__(passage_at, cached_queries=cached_queries)
        if vectors.shape[1] != encoder.dim:
            raise UserError(f"the vectors of an index have the encoder's size {encoder.dim}; got {vectors.shape[1]}")
        self._vectors, self._candidates, self._mesh = vectors, candidates, mesh
        layout = Layout.of(len(vectors), self._mesh.size)
        _check_memory(layout.bytes_per_device(encoder.dim, dtype), self._mesh, dtype)
        try:
            self._on_devices = load_vectors(vectors, layout, self._mesh, dtype)
        except ValueError as error:
            raise UserError(f"{error}. {AGAIN}") from error
        self._traced = encoder if isinstance(encoder, TracedEncoder) else _EncodedBefore(encoder)
        self._params = self._traced.params_on(self._mesh)
        self._program = make_search(self._mesh, layout, self._traced.embed)
        self._fingerprint = digest([corpus, encoder.fingerprint, "device", dtype, str(candidates)])
        self._thread, self._running = threading.get_ident(), threading.Lock()

    @classmethod
    def open(
        cls,
        config: RetrievalConfig,
        index_dir: Path,
        encoder: Callable[[], Encoder] | None = None,
        *,
        mesh: Mesh | None = None,
    ) -> DeviceRetriever:
        """Open an index directory with vectors.

        Args:
            mesh: the devices that search; if they are of several processes, all must call this. By default, those of
                this process.

        Raises:
            UserError: a file is missing, is not the one that was built, or was built with another encoder; the vectors
                do not fit the devices; another process sees another index.
        """
        manifest = read_manifest(index_dir)
        if manifest.kind not in KINDS:
            raise UserError(
                f"{index_dir} must hold an index of retrieval.kind={' or '.join(KINDS)}; got one of {manifest.kind}"
            )
        check_files(index_dir, manifest, manifest.files)
        opened = open_encoder(config, index_dir) if encoder is None else encoder()
        manifest.check_encoder(opened.fingerprint, index_dir)
        mesh = search_mesh(jax.local_devices()) if mesh is None else mesh
        if mesh.is_multi_process:
            check_same(lambda: [manifest.corpus, opened.fingerprint], "index")
        return cls(
            opened, PassageStore(index_dir).at, VectorShards.open(index_dir), manifest.corpus, mesh=mesh,
            dtype=config.device.dtype, candidates=config.device.candidates, cached_queries=config.cached_queries,
        )  # fmt: skip

    @staticmethod
    def write_files(
        config: RetrievalConfig, store: PassageStore, directory: Path, options: BuildOptions
    ) -> Mapping[str, str]:
        """Write the vectors of the passages, and the encoder's own file.

        Raises:
            UserError: the encoder cannot be read, or what was given does not fit it or the passages.
        """
        given = options.given
        if given.index is not None:
            raise UserError(f"an index of retrieval.kind=device holds vectors: --vectors FILE; got {given.index}")
        encoder = options.spread(new_encoder(config, store))
        encoder.save(directory)
        dtype = "float32" if config.vector_dtype == "auto" else config.vector_dtype
        if options.say is not None:
            size = len(store) * encoder.dim * np.dtype(dtype).itemsize / 2**30
            options.say(
                f"{len(store)} vectors of {encoder.dim} {dtype}, searched on the devices: {size:.2f} GiB on disk"
            )
        inputs = (encoder, store.at, len(store), directory, dtype, options.on_progress)
        copy_vectors(given.vectors, *inputs) if given.vectors else encode_passages(*inputs)
        return {"encoder": encoder.fingerprint}

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the passages' and the encoder's fingerprints, and of how vectors are stored and re-scored."""
        return self._fingerprint

    def rank(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """The min(k, P) nearest passages for each query; a query without a known feature finds nothing."""
        if self._mesh.is_multi_process and threading.get_ident() != self._thread:
            raise RuntimeError(
                "with several processes one thread searches, since device programs must start in the same order on "
                "all of them; got a search from another thread"
            )
        k = min(k, len(self._vectors))
        found = max(_MIN_FOUND, 1 << (max(k * self._candidates, k) - 1).bit_length())
        rankings: list[Ranking] = []
        with self._running:  # programs with collectives must not be started by two threads at once
            for count, inputs in self._traced.query_batches(queries, _ROWS):
                arrays = device_put_global(inputs, tuple(replicated(self._mesh) for _ in inputs))
                program = self._program(self._on_devices, self._params, *arrays, k=min(found, len(self._vectors)))
                scores, positions, vectors = (np.asarray(x.addressable_data(0))[:count] for x in program)
                rankings += [self._ranked(*query, k) for query in zip(scores, positions, vectors, strict=True)]
        return rankings

    def _ranked(self, scores_C: np.ndarray, positions_C: np.ndarray, vector_D: np.ndarray, k: int) -> Ranking:
        """The k best of the candidates."""
        if not np.isfinite(vector_D).all():
            raise ValueError("an encoder returns finite vectors; got NaN or infinity")
        if not vector_D.any():
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        if self._candidates:
            scores_C = np.einsum("cd,d->c", self._vectors.take(positions_C), vector_D)
        order = np.lexsort((positions_C, -scores_C))[:k]
        return positions_C[order].astype(np.int64), scores_C[order]


class _EncodedBefore:
    """A TracedEncoder whose vectors are computed on the host, before the program."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def query_batches(self, texts: Sequence[str], row_counts: Sequence[int]) -> Iterator[tuple[int, Inputs]]:
        for first in range(0, len(texts), row_counts[-1]):
            vectors_QD = encode(self._encoder, texts[first : first + row_counts[-1]], "query")
            missing = next(rows for rows in row_counts if rows >= len(vectors_QD)) - len(vectors_QD)
            yield len(vectors_QD), (np.pad(vectors_QD, ((0, missing), (0, 0))),)

    def embed(self, params: None, vectors_BD: jax.Array) -> jax.Array:
        return vectors_BD

    def params_on(self, mesh: Mesh) -> None:
        return None


def _check_memory(needed: int, mesh: Mesh, dtype: str) -> None:
    """Raise a UserError if the vectors alone are larger than a device's memory, where it is known."""
    memory = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if memory is not None and needed > memory:
        raise UserError(
            f"the vectors of each of {mesh.size} devices must fit its {memory / 2**30:.2f} GiB of memory; those of "
            f"retrieval.device.dtype={dtype} take {needed / 2**30:.2f}"
        )

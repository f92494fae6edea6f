"""Exact dense retrieval with FAISS: inner products of vectors, deterministic including ties."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Encoder, Hit, OnProgress, TextKind, failed_search
from r3rag_jax.retrieval.encoders.factory import new_encoder, open_encoder
from r3rag_jax.retrieval.fingerprint import corpus_fingerprint, digest
from r3rag_jax.retrieval.manifest import AGAIN, check_index
from r3rag_jax.retrieval.store import PassageStore
from r3rag_jax.types import Passage

INDEX_FILE = "index.faiss"
_CHUNK = 4096  # passages encoded at once: bounds the memory beside the index, paces `on_progress`
_SPARE_HITS = 8  # fetched beyond k, so that ties at rank k are resolved by position
_TIE = 1e-5  # FAISS sums in another order for another batch size: scores this close may be swapped


class FaissRetriever:
    """Searches vectors in memory for the largest inner products; passages are read when they are found."""

    def __init__(
        self, encoder: Encoder, passage_at: Callable[[int], Passage], num_passages: int, index: Any, corpus: str
    ) -> None:
        """
        Args:
            encoder: what the passages were encoded with; it encodes the queries.
            passage_at: position in [0, P) -> passage; equal scores are ranked by position.
            num_passages: P.
            index: a FAISS inner-product index over the passages' vectors [P, D].
            corpus: fingerprint of the passages.

        Raises:
            UserError: the index has another number or size of vectors.
        """
        if (index.ntotal, index.d) != (num_passages, encoder.dim):
            raise UserError(
                "an index holds one vector of the encoder's size per passage, "
                f"{num_passages} of {encoder.dim}; got {index.ntotal} of {index.d}. {AGAIN}"
            )
        self._encoder, self._passage_at, self._num_passages, self._index = encoder, passage_at, num_passages, index
        self._fingerprint = digest([corpus, encoder.fingerprint])

    @classmethod
    def of(cls, encoder: Encoder, passages: Sequence[Passage]) -> FaissRetriever:
        """A retriever over a few passages in memory, without any file.

        Raises:
            UserError: there are no passages, or two have the same id.
        """
        if not passages:
            raise UserError("an index needs at least one passage; the corpus is empty")
        id, count = collections.Counter(passage.id for passage in passages).most_common(1)[0]
        if count > 1:
            raise UserError(f"passage ids must be unique; {id!r} occurs twice")
        index = index_vectors(encoder, passages.__getitem__, len(passages), None)
        return cls(encoder, passages.__getitem__, len(passages), index, corpus_fingerprint(passages))

    @classmethod
    def open(
        cls, config: RetrievalConfig, index_dir: Path, encoder: Callable[[], Encoder] | None = None
    ) -> FaissRetriever:
        """Open an index directory.

        Raises:
            UserError: a file is missing, is not the one that was built, or was built with another encoder.
        """
        manifest = check_index(index_dir, "faiss")
        opened = open_encoder(config, index_dir) if encoder is None else encoder()
        if opened.fingerprint != manifest.depends_on.get("encoder"):
            raise UserError(
                f"the encoder must be the one that the index in {index_dir} was built with (the encoder file there "
                f"describes it; fingerprint {manifest.depends_on.get('encoder')}); got {opened.fingerprint}. {AGAIN}"
            )
        index = _import_faiss().read_index(str(index_dir / INDEX_FILE))
        store = PassageStore(index_dir)
        return cls(opened, store.at, len(store), index, manifest.corpus)

    @staticmethod
    def write_files(
        config: RetrievalConfig,
        store: PassageStore,
        directory: Path,
        on_progress: OnProgress | None = None,
    ) -> Mapping[str, str]:
        """Encode the passages and write `index.faiss`, and the encoder's own file."""
        encoder = new_encoder(config, store)
        encoder.save(directory)
        index = index_vectors(encoder, store.at, len(store), on_progress)
        _import_faiss().write_index(index, str(directory / INDEX_FILE))
        return {"encoder": encoder.fingerprint}

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the passages' and the encoder's fingerprints."""
        return self._fingerprint

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The min(k, P) nearest passages for each query, best first, equal scores by position.

        `[]` for a query without a known feature. A query's hits do not depend on the other queries of the batch if its
        vector does not.

        Raises:
            ValueError: k is not positive.
            RetrievalError: the encoder or FAISS failed; the message quotes the queries.
        """
        if k < 1:
            raise ValueError(f"k must be positive; got {k}")
        if not queries:
            return []
        try:
            vectors_QD = _encode(self._encoder, queries, "query")
            rows = np.flatnonzero(vectors_QD.any(axis=1))
            found = self._nearest(vectors_QD[rows], min(k, self._num_passages)) if len(rows) else ()
            hits: list[list[Hit]] = [[] for _ in queries]
            for row, (positions_K, scores_K) in zip(rows, found, strict=True):
                hits[row] = [Hit(self._passage_at(p), float(s)) for p, s in zip(positions_K, scores_K, strict=True)]
        except Exception as error:  # no failure may look like an empty result
            raise failed_search(queries, f"{type(error).__name__}: {error}") from error
        return hits

    def _nearest(self, vectors_QD: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(positions, scores), both [k], for each query: FAISS finds candidates, sums in a fixed order rank them."""
        num_candidates = min(k + _SPARE_HITS, self._num_passages)
        while True:
            scores_QC, positions_QC = self._index.search(vectors_QD, num_candidates)
            may_tie_at_k = (scores_QC[:, -1] >= scores_QC[:, k - 1] - _TIE).any()
            if num_candidates == self._num_passages or not may_tie_at_k:
                break
            num_candidates = min(4 * num_candidates, self._num_passages)
        if (positions_QC < 0).any():
            raise RuntimeError(f"the index returned fewer than {num_candidates} candidates")
        found = []
        for vector_D, positions_C in zip(vectors_QD, positions_QC, strict=True):
            scores_C = np.einsum("cd,d->c", self._index.reconstruct_batch(positions_C), vector_D)
            order = np.lexsort((positions_C, -scores_C))[:k]
            found.append((positions_C[order], scores_C[order]))
        return found


def index_vectors(
    encoder: Encoder, passage_at: Callable[[int], Passage], num_passages: int, on_progress: OnProgress | None
) -> Any:
    """A FAISS index of the vectors of passages [0, num_passages)."""
    index = _import_faiss().IndexFlatIP(encoder.dim)
    for start in range(0, num_passages, _CHUNK):
        stop = min(start + _CHUNK, num_passages)
        index.add(_encode(encoder, [passage_at(p).contents for p in range(start, stop)], "passage"))
        if on_progress is not None:
            on_progress(stop - start, num_passages)
    return index


def _import_faiss() -> Any:
    """FAISS, imported where it is first needed: other retrievers work without it."""
    try:
        with warnings.catch_warnings():
            # Its SWIG wrappers warn about their own types on Python 3.12.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            import faiss
    except ImportError as error:
        raise UserError(f"a FAISS index needs the package faiss-cpu: pip install faiss-cpu ({error})") from error
    return faiss


def _encode(encoder: Encoder, texts: Sequence[str], kind: TextKind) -> np.ndarray:
    """float32 [N, D], C-contiguous as FAISS requires, checked to be finite and of that shape."""
    vectors_ND = np.ascontiguousarray(encoder.encode(texts, kind=kind), np.float32)
    if vectors_ND.shape != (len(texts), encoder.dim):
        raise ValueError(f"an encoder returns {(len(texts), encoder.dim)} floats; got {vectors_ND.shape}")
    if not np.isfinite(vectors_ND).all():
        bad = int(np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))[0])
        raise ValueError(f"an encoder returns finite vectors; got NaN or infinity for {texts[bad]!r}")
    return vectors_ND

"""Dense retrieval with FAISS: inner products of vectors, exact or of candidates, deterministic including ties."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.retrieval.ann import FaissIndexes, build_hnsw, build_ivfpq, import_faiss, merge
from r3rag_jax.retrieval.base import BuildOptions, Encoder
from r3rag_jax.retrieval.encoders.factory import new_encoder, open_encoder
from r3rag_jax.retrieval.encoding import CHUNK, copy_vectors, encode, encode_passages
from r3rag_jax.retrieval.fingerprint import corpus_fingerprint, digest
from r3rag_jax.retrieval.given import GIVEN, open_given, take_index
from r3rag_jax.retrieval.manifest import AGAIN, Manifest, check_index
from r3rag_jax.retrieval.planner import FaissPlan, check_memory, describe, plan_faiss
from r3rag_jax.retrieval.ranked import RankedRetriever, Ranking
from r3rag_jax.retrieval.store import PassageStore
from r3rag_jax.retrieval.vectors import VectorShards
from r3rag_jax.types import Passage

_BLOCK = 16_384  # float16 vectors that are widened and searched at once
_SPARE_HITS = 8  # fetched beyond k, so that ties at rank k are resolved by position
_NUM_MEASURED, _LOW_RECALL = 64, 0.9  # queries of `_measured`, and from which recall on an index is as it should be
_TIE = 1e-5  # FAISS sums in another order for another batch size: scores this close may be swapped


class VectorIndex(Protocol):
    """What is asked of an index: FAISS's own, or one of the classes with the same method."""

    ntotal: int
    d: int

    def search(self, vectors_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores, positions), both [Q, k], best first; position -1 where fewer were found."""
        ...


class FaissRetriever(RankedRetriever):
    """Searches vectors for the largest inner products; passages are read when they are found."""

    def __init__(
        self,
        encoder: Encoder,
        passage_at: Callable[[int], Passage],
        num_passages: int,
        index: VectorIndex,
        corpus: str,
        *,
        take: Callable[[np.ndarray], np.ndarray] | None,
        vectors: VectorShards | None = None,
        plan: FaissPlan | None = None,
        settings: str = "",
        cached_queries: int = 0,
    ) -> None:
        """
        Args:
            encoder: what the passages were encoded with; it encodes the queries.
            passage_at: position in [0, P) -> passage; equal scores are ranked by position.
            num_passages: P.
            index: an inner-product index over the passages' vectors [P, D].
            corpus: fingerprint of the passages.
            take: positions [N] -> vectors, float32 [N, D], whose inner products rank what the index finds; None where
                the index's own scores do.
            vectors: what `exact` searches.
            plan: of an index that finds approximate candidates; None where it searches exactly.
            settings: what the hits depend on besides corpus and encoder.

        Raises:
            UserError: the index has another number or size of vectors.
        """
        super().__init__(passage_at, cached_queries=cached_queries)
        if (index.ntotal, index.d) != (num_passages, encoder.dim):
            raise UserError(
                "an index holds one vector of the encoder's size per passage, "
                f"{num_passages} of {encoder.dim}; got {index.ntotal} of {index.d}. {AGAIN}"
            )
        self._encoder, self._num_passages, self._index, self._take, self._plan = (
            encoder,
            num_passages,
            index,
            take,
            plan,
        )
        self._corpus, self._vectors = corpus, vectors
        self._fingerprint = digest([corpus, encoder.fingerprint, *([settings] if settings else [])])

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
        texts = [passage.contents for passage in passages]
        chunks = [encode(encoder, texts[first : first + CHUNK], "passage") for first in range(0, len(texts), CHUNK)]
        vectors, corpus = VectorShards(chunks), corpus_fingerprint(passages)
        return cls(encoder, passages.__getitem__, len(passages), ExactIndex(vectors), corpus, take=vectors.take)

    @classmethod
    def open(
        cls, config: RetrievalConfig, index_dir: Path, encoder: Callable[[], Encoder] | None = None
    ) -> FaissRetriever:
        """Open an index directory.

        Raises:
            UserError: a file is missing, is not the one that was built, or was built with another encoder.
        """
        return cls.open_part(config, index_dir, check_index(index_dir, "faiss"), encoder)

    @classmethod
    def open_part(
        cls, config: RetrievalConfig, index_dir: Path, manifest: Manifest, encoder: Callable[[], Encoder] | None = None
    ) -> FaissRetriever:
        """As `open`, of an index whose files were checked, and which may hold more."""
        opened = open_encoder(config, index_dir) if encoder is None else encoder()
        manifest.check_encoder(opened.fingerprint, index_dir)
        store = PassageStore(index_dir)
        built = _built_facts(manifest, index_dir)
        parts = open_given(config.faiss, index_dir, built) if built["kind"] == GIVEN else None
        parts = parts or _open_built(config, index_dir, built, len(store), opened.dim)
        cached = config.cached_queries
        return cls(opened, store.at, len(store), corpus=manifest.corpus, cached_queries=cached, **parts)

    @staticmethod
    def write_files(
        config: RetrievalConfig, store: PassageStore, directory: Path, options: BuildOptions
    ) -> Mapping[str, str]:
        """Write the vectors of the passages, the index over them, and the encoder's own file.

        Raises:
            UserError: the encoder cannot be read, or what was given does not fit it or the passages.
        """
        given, say, on_progress = options.given, options.say, options.on_progress
        encoder = options.spread(new_encoder(config, store))
        encoder.save(directory)
        facts: Mapping[str, Any]
        if given.index is not None:
            facts = take_index(given.index, encoder, store, directory)
        else:
            plan = plan_faiss(config, len(store), encoder.dim)
            if say is not None:
                say(describe(plan, len(store), encoder.dim))
            check_memory(plan, len(store), encoder.dim, config.memory_gb)
            inputs = (encoder, store.at, len(store), directory, plan.dtype, on_progress)
            vectors = copy_vectors(given.vectors, *inputs) if given.vectors else encode_passages(*inputs)
            if plan.kind == "hnsw":
                build_hnsw(vectors, directory, plan, config.memory_gb, on_progress)
            elif plan.kind == "ivfpq":
                build_ivfpq(vectors, directory, plan, on_progress)
            if plan.kind != "flat" and say is not None:
                say(_measured(plan, encoder, store, vectors, directory))
            facts = plan.build_facts()
        return {"encoder": encoder.fingerprint, "faiss": json.dumps(facts, sort_keys=True)}

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the passages' and the encoder's fingerprints and, unless the search is exact, its settings."""
        return self._fingerprint

    def exact(self) -> FaissRetriever | None:
        """An exact search over the same vectors; None where the index does not hold them."""
        if self._vectors is None:
            return self if self._plan is None else None
        index, take = ExactIndex(self._vectors), self._vectors.take
        return FaissRetriever(self._encoder, self._passage_at, self._num_passages, index, self._corpus, take=take)

    def rank(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """The min(k, P) nearest passages for each query; at most k candidates where the search is approximate.

        A query without a known feature finds nothing.

        A query's hits do not depend on the other queries of the batch if its vector does not.
        """
        vectors_QD = encode(self._encoder, queries, "query")
        rows = np.flatnonzero(vectors_QD.any(axis=1))
        nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
        rankings: list[Ranking] = [nothing] * len(queries)
        if len(rows):
            nearest = self._nearest if self._plan is None else self._nearest_candidates
            for row, ranking in zip(rows, nearest(vectors_QD[rows], min(k, self._num_passages)), strict=True):
                rankings[row] = ranking
        return rankings

    def _nearest(self, vectors_QD: np.ndarray, k: int) -> list[Ranking]:
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
        return [self._ranked(*query, k) for query in zip(vectors_QD, positions_QC, scores_QC, strict=True)]

    def _nearest_candidates(self, vectors_QD: np.ndarray, k: int) -> list[Ranking]:
        """At most k of the candidates that an approximate index finds, for each query."""
        assert self._plan is not None
        num_candidates = min(self._plan.num_candidates(k), self._num_passages)
        scores_QC, positions_QC = self._index.search(vectors_QD, num_candidates)
        found = positions_QC >= 0
        return [
            self._ranked(vector_D, positions_QC[q][found[q]], scores_QC[q][found[q]], k)
            for q, vector_D in enumerate(vectors_QD)
        ]

    def _ranked(self, vector_D: np.ndarray, positions_C: np.ndarray, scores_C: np.ndarray, k: int) -> Ranking:
        if self._take is not None:
            scores_C = np.einsum("cd,d->c", self._take(positions_C), vector_D)
        order = np.lexsort((positions_C, -scores_C))[:k]
        return positions_C[order], scores_C[order]


class ExactIndex:
    """Exact search over stored vectors; nothing is kept in memory but what the system's page cache holds."""

    def __init__(self, vectors: VectorShards) -> None:
        self._vectors = vectors
        self.ntotal, self.d = vectors.shape

    def search(self, vectors_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores, positions), both [Q, min(k, P)], best first."""
        faiss = import_faiss()
        found, starts = [], []
        size = _BLOCK if self._vectors.dtype == np.float16 else None
        start = 0
        for shard in self._vectors:
            for first in range(0, len(shard), size or len(shard)):
                rows_ND = shard[first : first + (size or len(shard))]
                found.append(faiss.knn(vectors_QD, rows_ND, min(k, len(rows_ND)), faiss.METRIC_INNER_PRODUCT))
                starts.append(start + first)
            start += len(shard)
        return merge(found, starts, k)


def _measured(plan: FaissPlan, encoder: Encoder, store: PassageStore, vectors: VectorShards, directory: Path) -> str:
    """recall@10 of an approximate index against exact search, with first lines of passages as queries, in words."""
    positions = np.unique(np.linspace(0, len(store) - 1, _NUM_MEASURED).astype(np.int64)).tolist()
    titles = [store.at(position).contents.partition("\n")[0][:200] for position in positions]
    vectors_QD, k = encode(encoder, titles, "query"), min(10, len(store))
    _, exact_QK = ExactIndex(vectors).search(vectors_QD, k)
    index = FaissIndexes.open(directory, search_ef=plan.hnsw_search_ef, probes=plan.ivf_probes)
    _, found_QC = index.search(vectors_QD, min(plan.num_candidates(k), len(store)))
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(exact_QK, found_QC, strict=True)])
    low = "" if recall >= _LOW_RECALL else "; that is low: choose --kind flat, or raise what a search reads"
    return f"recall@{k} against exact search, first lines of {len(titles)} passages as queries: {recall:.3f}{low}"


def _built_facts(manifest: Manifest, index_dir: Path) -> dict[str, Any]:
    """What the index was built with."""
    try:
        built = parse_json(manifest.depends_on["faiss"])
        if not isinstance(built["kind"], str):
            raise TypeError("kind is a text")
        return built
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"the index in {index_dir} must name what FAISS was built with: {error}. {AGAIN}") from error


def _open_built(
    config: RetrievalConfig, index_dir: Path, built: Mapping[str, Any], num_passages: int, dim: int
) -> dict[str, Any]:
    """Arguments of FaissRetriever for an index that this package has built."""
    kind = built["kind"] if config.faiss.kind == "auto" else config.faiss.kind
    plan = plan_faiss(config.replace(faiss=config.faiss.replace(kind=kind)), num_passages, dim)
    wanted = plan.build_facts()
    if other := sorted(name for name in wanted if wanted[name] != built.get(name)):
        raise UserError(
            f"the index in {index_dir} must have the retrieval keys that it was built with; "
            + ", ".join(f"{name} is {built.get(name)} there; got {wanted[name]}" for name in other)
            + f". {AGAIN}"
        )
    vectors = VectorShards.open(index_dir)
    if plan.kind == "flat":
        settings = "" if plan.dtype == "float32" else plan.dtype
        return {"index": ExactIndex(vectors), "take": vectors.take, "settings": settings}
    indexes = FaissIndexes.open(index_dir, search_ef=plan.hnsw_search_ef, probes=plan.ivf_probes)
    settings = json.dumps(dataclasses.asdict(plan), sort_keys=True)
    return {"index": indexes, "take": vectors.take, "vectors": vectors, "plan": plan, "settings": settings}

"""Hybrid retrieval: FAISS and BM25 over one index, fused by the ranks of their hits.

Reciprocal-rank fusion (Cormack, Clarke and Büttcher 2009): score(p) = sum over both of 1 / (c + rank of p), ranks from
1; a passage that one of them does not find gets nothing from it. Scores of the two are never compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from r3rag_jax.config.retrieval import HybridConfig, RetrievalConfig
from r3rag_jax.retrieval.base import BuildOptions, Encoder
from r3rag_jax.retrieval.bm25 import BM25Retriever
from r3rag_jax.retrieval.faiss import FaissRetriever
from r3rag_jax.retrieval.fingerprint import digest
from r3rag_jax.retrieval.manifest import check_index
from r3rag_jax.retrieval.ranked import RankedRetriever, Ranking
from r3rag_jax.retrieval.store import PassageStore
from r3rag_jax.types import Passage


class HybridRetriever(RankedRetriever):
    """Fuses the ranks of several retrievers over the same passages."""

    def __init__(
        self,
        retrievers: Sequence[RankedRetriever],
        passage_at: Callable[[int], Passage],
        config: HybridConfig,
        *,
        cached_queries: int = 0,
    ) -> None:
        super().__init__(passage_at, cached_queries=cached_queries)
        self._retrievers, self._config = retrievers, config
        settings = f"hybrid {config.rank_constant} {config.depth}"
        self._fingerprint = digest([settings, *(retriever.fingerprint for retriever in retrievers)])

    @classmethod
    def open(
        cls, config: RetrievalConfig, index_dir: Path, encoder: Callable[[], Encoder] | None = None
    ) -> HybridRetriever:
        """Open an index directory, which holds the files of both.

        Raises:
            UserError: as `FaissRetriever.open` and `BM25Retriever.open`.
        """
        manifest = check_index(index_dir, "hybrid")
        own = config.replace(cached_queries=0)  # what is remembered is the fused ranking
        retrievers = (
            FaissRetriever.open_part(own, index_dir, manifest, encoder),
            BM25Retriever.open_part(own, index_dir, manifest),
        )
        return cls(retrievers, PassageStore(index_dir).at, config.hybrid, cached_queries=config.cached_queries)

    @staticmethod
    def write_files(
        config: RetrievalConfig, store: PassageStore, directory: Path, options: BuildOptions
    ) -> Mapping[str, str]:
        """Write the files of both, those of BM25 first: they take less time."""

        def on_words(count: int, total: int, stage: str = "words") -> None:
            if options.on_progress is not None:
                options.on_progress(count, total, stage)

        words = BM25Retriever.write_files(config, store, directory, BuildOptions(on_words))
        return {**words, **FaissRetriever.write_files(config, store, directory, options)}

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the retrievers' fingerprints and the settings."""
        return self._fingerprint

    def rank(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """The k passages of the highest fused scores for each query."""
        depth = max(k, self._config.depth)
        found = [retriever.rank(queries, depth) for retriever in self._retrievers]
        return [self._fused([positions for positions, _ in rankings], k) for rankings in zip(*found, strict=True)]

    def _fused(self, rankings: Sequence[np.ndarray], k: int) -> Ranking:
        positions, rows = np.unique(np.concatenate(rankings), return_inverse=True)
        terms = [1 / (self._config.rank_constant + np.arange(1, len(ranking) + 1)) for ranking in rankings]
        scores = np.bincount(rows, np.concatenate(terms), len(positions)).astype(np.float32)
        order = np.lexsort((positions, -scores))[:k]
        return positions[order], scores[order]

"""What the retrievers over an index share: they rank positions of passages, and a search reads the passages found."""

from __future__ import annotations

import abc
import collections
import threading
from collections.abc import Callable, Sequence

import numpy as np

from r3rag_jax.retrieval.base import Hit, failed_search
from r3rag_jax.types import Passage

Ranking = tuple[np.ndarray, np.ndarray]  # positions int64 [n] of passages, best first, and their scores float32 [n]


class RankedRetriever(abc.ABC):
    """A Retriever whose subclass ranks positions; equal scores are ranked by position, which is the corpus's order.

    A query that occurs twice in a batch is searched once. The last `cached_queries` different queries are remembered;
    positions are kept, not passages, so that an entry takes 12 bytes per hit.
    """

    def __init__(self, passage_at: Callable[[int], Passage], *, cached_queries: int = 0) -> None:
        """
        Args:
            passage_at: position -> passage.
            cached_queries: queries that are remembered, the least recently used one is dropped first; 0 for none.
        """
        self._passage_at = passage_at
        self._cache: collections.OrderedDict[tuple[str, int], Ranking] = collections.OrderedDict()
        self._cached_queries, self._lock = cached_queries, threading.Lock()

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """See `Retriever.fingerprint`."""

    @abc.abstractmethod
    def rank(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """The best positions for each of different queries, at most `k` > 0; may raise anything."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """At most `k` passages for each query, best first, equal scores by position; `[]` where nothing matches.

        Raises:
            ValueError: k is not positive.
            RetrievalError: the search failed; the message quotes the queries.
        """
        if k < 1:
            raise ValueError(f"k must be positive; got {k}")
        try:
            found = self._cached(queries, k)
            new = [query for query in dict.fromkeys(queries) if query not in found]
            if new:
                ranked = dict(zip(new, self.rank(new, k), strict=True))
                self._remember(ranked, k)
                found |= ranked
            hits = {query: self._hits(*ranking) for query, ranking in found.items()}
        except Exception as error:  # no failure may look like an empty result
            raise failed_search(queries, f"{type(error).__name__}: {error}") from error
        return [list(hits[query]) for query in queries]

    def _hits(self, positions: np.ndarray, scores: np.ndarray) -> list[Hit]:
        return [Hit(self._passage_at(p), float(s)) for p, s in zip(positions, scores, strict=True)]

    def _cached(self, queries: Sequence[str], k: int) -> dict[str, Ranking]:
        """The rankings that are remembered of the queries."""
        with self._lock:
            known = {query: self._cache[query, k] for query in queries if (query, k) in self._cache}
            for query in known:
                self._cache.move_to_end((query, k))
        return known

    def _remember(self, ranked: dict[str, Ranking], k: int) -> None:
        if not self._cached_queries:
            return
        with self._lock:
            self._cache.update({(query, k): ranking for query, ranking in ranked.items()})
            while len(self._cache) > self._cached_queries:
                self._cache.popitem(last=False)

"""One retriever for several processes: process 0 searches, and all of them get its reply or its error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from r3rag_jax.parallel.processes import on_process_0
from r3rag_jax.retrieval.base import Hit, RetrievalError, Retriever, search_hits
from r3rag_jax.retrieval.fingerprint import digest
from r3rag_jax.types import Passage

TIMEOUT_S = 3600.0  # of a search on process 0; longer than a remote retriever with all its retries takes


class BroadcastRetriever:
    """A Retriever that process 0 alone opens and searches.

    Every process must make the same searches, from any threads and in any order. The hits, scores included, are equal
    on all processes, so that what follows from them is computed alike everywhere; if process 0 fails, all raise.
    """

    def __init__(self, open_retriever: Callable[[], Retriever]) -> None:
        """
        Raises:
            UserError: process 0 could not open the retriever.
        """
        self._retriever: Retriever | None = None

        def open_it() -> str:
            self._retriever = open_retriever()
            return self._retriever.fingerprint

        self._fingerprint: str = on_process_0(open_it, "retriever")

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the retriever on process 0."""
        return self._fingerprint

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Retriever.search`."""
        if k < 1:
            raise ValueError(f"k must be positive; got {k}")

        def search_it() -> list[list[Any]]:
            assert self._retriever is not None  # process 0 opened it
            found = search_hits(self._retriever, queries, k)
            return [[[hit.passage.id, hit.passage.contents, hit.score] for hit in hits] for hits in found]

        # Named by its content, since searches of several threads start in another order on each process.
        name = f"search/{digest([str(k), *queries])}"
        rows = on_process_0(search_it, name, error_type=RetrievalError, timeout_s=TIMEOUT_S)
        return [[Hit(Passage(id, contents), score) for id, contents, score in hits] for hits in rows]

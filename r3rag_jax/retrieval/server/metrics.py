"""What the retrieval server counts besides its requests."""

from __future__ import annotations

from prometheus_client import Histogram

from r3rag_jax.serving.metrics import SECONDS, RequestMetrics

QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class ServerMetrics(RequestMetrics):
    """The metrics of one retrieval server."""

    def __init__(self) -> None:
        super().__init__()
        self._batch_queries = Histogram(
            "r3rag_batch_queries", "Queries searched together", buckets=QUERIES, registry=self.registry
        )
        self._search_seconds = Histogram(
            "r3rag_search_seconds", "A search of the retriever", buckets=SECONDS, registry=self.registry
        )

    def searched(self, num_queries: int, seconds: float) -> None:
        """See `batching.BatchObserver`."""
        self._batch_queries.observe(num_queries)
        self._search_seconds.observe(seconds)

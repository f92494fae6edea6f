"""What a server counts, in Prometheus' text format (prometheus_client, which orbax brings along)."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
OTHER = "other"  # the path of requests to no route: names of clients' choosing would be stored without end


class RequestMetrics:
    """The metrics of one server: its requests, and gauges."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "r3rag_requests", "Requests by path and status", ("path", "status"), registry=self.registry
        )
        self._request_seconds = Histogram(
            "r3rag_request_seconds", "From a request's headers to the end of its reply", ("path",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def watch(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A gauge that is read when the metrics are."""
        Gauge(f"r3rag_{name}", help, registry=self.registry).set_function(value)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request has its reply."""
        self._requests.labels(path, str(status)).inc()
        self._request_seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        return generate_latest(self.registry)

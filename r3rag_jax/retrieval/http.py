"""A remote retriever: any server that speaks Search-R1's `POST /retrieve`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from r3rag_jax.clients.endpoint import Endpoint
from r3rag_jax.config.endpoint import EndpointConfig
from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Encoder, Hit, OnProgress, failed_search
from r3rag_jax.retrieval.fingerprint import digest
from r3rag_jax.retrieval.store import PassageStore
from r3rag_jax.retrieval.wire import WireError, read_retrieve_reply, retrieve_request

PATH = "/retrieve"
MAX_QUERIES = 64  # of a request; `max_in_flight` of them wait for their replies at the same time


class HttpRetriever:
    """Sends queries to a server, in requests of at most MAX_QUERIES."""

    def __init__(self, config: EndpointConfig) -> None:
        """
        Args:
            config: `url` is the server's, with or without `/retrieve`; `model` is not used.

        Raises:
            UserError: the URL is invalid, or the environment variable of the key is not set.
        """
        url = config.url.rstrip("/").removesuffix(PATH)
        self._endpoint = Endpoint(config.replace(url=url), name="retrieval.endpoint")
        self._fingerprint = digest(["http", url])

    @classmethod
    def open(
        cls, config: RetrievalConfig, index_dir: Path, encoder: Callable[[], Encoder] | None = None
    ) -> HttpRetriever:
        """The retriever at `retrieval.endpoint`; nothing is read from `index_dir`."""
        return cls(config.endpoint)

    @staticmethod
    def write_files(
        config: RetrievalConfig, store: PassageStore, directory: Path, on_progress: OnProgress | None = None
    ) -> Mapping[str, str]:
        """Nothing: the server has the index. The passages themselves are kept for the cold start."""
        return {}

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the URL. What the server searches is not known: it may change behind the same URL."""
        return self._fingerprint

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """At most `k` hits for each query, as the server ranks them.

        Raises:
            ValueError: k is not positive.
            RetrievalError: the server refuses, keeps failing, or breaks the format; the message quotes the queries.
        """
        if k < 1:
            raise ValueError(f"k must be positive; got {k}")
        batches = [queries[start : start + MAX_QUERIES] for start in range(0, len(queries), MAX_QUERIES)]
        found: dict[int, list[list[Hit]]] = {}
        failure: UserError | None = None
        for number, hits in self._endpoint.call_all(lambda batch: self._search(batch, k), batches):
            if isinstance(hits, UserError):
                failure = failure or hits
                self._endpoint.give_up()
            else:
                found[number] = hits
        if len(found) < len(batches):  # also where a search of another thread has given up
            raise failed_search(queries, failure or f"{self._endpoint.url}{PATH} has failed") from failure
        return [row for number in range(len(batches)) for row in found[number]]

    def _search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        reply = self._endpoint.call(PATH, retrieve_request(queries, k))
        try:
            return read_retrieve_reply(reply, len(queries), k)
        except WireError as error:
            raise self._endpoint.malformed(PATH, f"in Search-R1's format ({error})", reply) from error

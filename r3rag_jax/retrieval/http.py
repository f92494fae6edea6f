"""A remote retriever: `python -m r3rag_jax.serve`, or any server that speaks a format of Search-R1 or R3-RAG."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from r3rag_jax.clients.endpoint import Endpoint
from r3rag_jax.config.retrieval import RemoteRetrieverConfig, RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import BuildOptions, Encoder, Hit, failed_search
from r3rag_jax.retrieval.fingerprint import digest
from r3rag_jax.retrieval.store import PassageStore
from r3rag_jax.retrieval.wire import FORMATS, WireError

INDEX_PATH = "/v1/index"


class HttpRetriever:
    """Sends queries to a server and its replicas; `max_in_flight` requests wait for their replies at the same time."""

    def __init__(self, config: RemoteRetrieverConfig) -> None:
        """
        Args:
            config: URLs are the servers', with or without the path of the format; `model` is not used.

        Raises:
            UserError: a URL is invalid, or the environment variable of the key is not set.
        """
        self._format, self._is_native = FORMATS[config.format], config.format == "native"
        urls = [url.rstrip("/").removesuffix(self._format.path) for url in config.urls]
        self._endpoint = Endpoint(config.replace(url=urls[0], replicas=tuple(urls[1:])), name="retrieval.endpoint")
        self._given = digest(["http", urls[0]] if config.format == "search_r1" else ["http", config.format, urls[0]])
        self._native_fingerprint: str | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, config: RetrievalConfig, index_dir: Path, encoder: Callable[[], Encoder] | None = None
    ) -> HttpRetriever:
        """The retriever at `retrieval.endpoint`; nothing is read from `index_dir`."""
        return cls(config.endpoint)

    @staticmethod
    def write_files(
        config: RetrievalConfig, store: PassageStore, directory: Path, options: BuildOptions
    ) -> Mapping[str, str]:
        """Nothing: the server has the index. The passages themselves are kept for the cold start."""
        return {}

    @property
    def fingerprint(self) -> str:
        """With the native format the fingerprint of the server's retriever, for which a server is asked once.

        Otherwise hex SHA-256 of format and URL. What such a server searches is not known: it may change behind the
        same URL.

        Raises:
            UserError: a server must be asked, and none answers.
        """
        if not self._is_native:
            return self._given
        if self._native_fingerprint is None:
            reply = self._endpoint.call(INDEX_PATH)
            if not isinstance(reply, dict) or not isinstance(reply.get("fingerprint"), str):
                raise self._endpoint.malformed(INDEX_PATH, "an object with a fingerprint", reply)
            self._check_fingerprint(INDEX_PATH, reply)
        assert self._native_fingerprint is not None
        return self._native_fingerprint

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """At most `k` hits for each query, as the server ranks them.

        Raises:
            ValueError: k is not positive.
            RetrievalError: a server refuses, all keep failing, one breaks the format, or has another index than was
                searched before; the message quotes the queries.
        """
        if k < 1:
            raise ValueError(f"k must be positive; got {k}")
        size = self._format.max_queries
        batches = [queries[start : start + size] for start in range(0, len(queries), size)]
        endpoint = self._endpoint.separate()  # other threads search, too
        found: dict[int, list[list[Hit]]] = {}
        failure: UserError | None = None
        for number, hits in endpoint.call_all(lambda batch: self._search(endpoint, batch, k), batches):
            if isinstance(hits, UserError):
                failure = failure or hits
                endpoint.give_up()
            else:
                found[number] = hits
        if failure is not None:
            raise failed_search(queries, failure) from failure
        return [row for number in range(len(batches)) for row in found[number]]

    def _search(self, endpoint: Endpoint, queries: Sequence[str], k: int) -> list[list[Hit]]:
        path = self._format.path
        reply = endpoint.call(path, self._format.request(queries, k))
        try:
            hits = self._format.read(reply, len(queries), k)
        except WireError as error:
            raise self._endpoint.malformed(path, f"in {self._format.title} ({error})", reply) from error
        if self._is_native:
            self._check_fingerprint(path, reply)
        return hits

    def _check_fingerprint(self, path: str, reply: Mapping[str, Any]) -> None:
        """Raise a UserError if a server has another index than the one that answered first."""
        with self._lock:
            self._native_fingerprint = self._native_fingerprint or str(reply.get("fingerprint"))
            expected = self._native_fingerprint
        if reply.get("fingerprint") != expected:
            raise self._endpoint.malformed(
                path,
                f"from the index that it had, of fingerprint {expected}",
                {"fingerprint": reply.get("fingerprint")},
            )

"""`retrieval.kind=http` against the package's own server, in each format, through restarts and other indexes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from corpora import encyclopedia
from serving import port, serving

from r3rag_jax.config import RemoteRetrieverConfig, RetrievalConfig
from r3rag_jax.retrieval.base import Hit, RetrievalError, Retriever
from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.factory import open_retriever
from r3rag_jax.retrieval.faiss import FaissRetriever
from r3rag_jax.retrieval.server.run import SearchServer

QUERIES = [passage.title for passage in encyclopedia()[:130:2]]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def local() -> FaissRetriever:
    passages = encyclopedia()
    return FaissRetriever.of(HashEncoder().fit(passage.contents for passage in passages), passages)


@pytest.fixture(scope="module")
def server(local: FaissRetriever) -> Iterator[SearchServer]:
    with serving(local) as running:
        yield running


def remote(url: str, format: str = "native", **settings: Any) -> Retriever:
    endpoint = RemoteRetrieverConfig(url=url, format=format, **({"retries": 0, "timeout_s": 20.0} | settings))
    return open_retriever(RetrievalConfig(kind="http", endpoint=endpoint), "no index")


@pytest.mark.parametrize("format", ["native", "search_r1"])
def test_hits_are_equal_to_those_of_the_servers_retriever(
    server: SearchServer, local: FaissRetriever, format: str
) -> None:
    retriever = remote(server.url, format)
    assert retriever.search([*QUERIES, ""], 4) == local.search([*QUERIES, ""], 4)
    assert (retriever.fingerprint == local.fingerprint) == (format == "native")


@pytest.mark.parametrize(("format", "path"), [("r3rag", "/search"), ("r3rag_batch", "/search/")])
def test_formats_without_k_give_what_the_server_gives(
    server: SearchServer, local: FaissRetriever, format: str, path: str
) -> None:
    retriever = remote(server.url + path, format, max_in_flight=4)
    for k, num_hits in ((3, 3), (50, 5)):
        found = retriever.search(QUERIES[:10], k)
        assert [[hit.passage for hit in row] for row in found] == [
            [hit.passage for hit in row] for row in local.search(QUERIES[:10], num_hits)
        ]
    assert len({retriever.fingerprint, local.fingerprint, remote(server.url).fingerprint}) == 2


def test_another_index_behind_the_same_url_is_an_error(local: FaissRetriever) -> None:
    other = FaissRetriever.of(HashEncoder(64).fit(["x"]), encyclopedia()[:3])
    with serving(local) as server:
        retriever = remote(server.url, retries=6)
        assert retriever.search(["harbor"], 1) == local.search(["harbor"], 1)
    with serving(other, port=port(server)), pytest.raises(RetrievalError, match="from the index that it had") as caught:
        retriever.search(["harbor"], 1)
    assert local.fingerprint in str(caught.value)
    with serving(local) as one, serving(other) as two, pytest.raises(RetrievalError, match="from the index that it ha"):
        remote(one.url, replicas=(two.url,), max_in_flight=1).search(QUERIES * 2, 1)


class Counting:
    """A retriever that counts its searches."""

    def __init__(self, retriever: Retriever):
        self.fingerprint, self._retriever, self.num_searches = retriever.fingerprint, retriever, 0

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.num_searches += 1
        return self._retriever.search(queries, k)


def test_no_search_is_lost_while_a_server_restarts(local: FaissRetriever) -> None:
    """Clients search all the time while the server shuts down and comes back on its port."""
    before, after, is_over = Counting(local), Counting(local), threading.Event()
    expected = local.search(["harbor"], 2)

    def search_on(retriever: Retriever) -> int:
        num_searches = 0
        while not is_over.is_set():
            assert retriever.search(["harbor"], 2) == expected
            num_searches += 1
        return num_searches

    def wait_for(counting: Counting) -> None:
        while counting.num_searches < 20 and not any(client.done() for client in clients):
            is_over.wait(0.01)

    with ThreadPoolExecutor(4) as pool:
        try:
            with serving(before) as server:
                retriever = remote(server.url, retries=8)
                clients = [pool.submit(search_on, retriever) for _ in range(4)]
                wait_for(before)
            with serving(after, port=port(server)):
                wait_for(after)
                is_over.set()
                assert all(client.result(30) > 0 for client in clients)
        finally:
            is_over.set()
    assert min(before.num_searches, after.num_searches) >= 20

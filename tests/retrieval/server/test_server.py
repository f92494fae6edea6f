"""The server over real sockets: every format as its published clients send it, and what is refused."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from corpora import encyclopedia
from serving import port, serving

from r3rag_jax.config.serving import ServeConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.faiss import FaissRetriever
from r3rag_jax.retrieval.server.app import IndexInfo
from r3rag_jax.retrieval.server.run import SearchServer

LIMITS = {"max_k": 9, "max_queries": 4, "max_hits": 20, "max_query_chars": 40, "max_body_bytes": 1000, "k": 3}


@pytest.fixture(scope="module")
def local() -> FaissRetriever:
    passages = encyclopedia()
    return FaissRetriever.of(HashEncoder().fit(passage.contents for passage in passages), passages)


@pytest.fixture(scope="module")
def server(local: FaissRetriever) -> Iterator[SearchServer]:
    with serving(local, **LIMITS) as running:
        yield running


def send(
    server: SearchServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON or text, and headers of a reply."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    connection.request(method, path, body, headers)
    with connection.getresponse() as reply:
        content, found = reply.read(), {name.lower(): value for name, value in reply.getheaders()}
        is_json = found.get("content-type") == "application/json"
        status = reply.status
    connection.close()
    return status, json.loads(content) if is_json else content.decode(), found


def post(server: SearchServer, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return send(server, "POST", path, content, **{"Content-Type": "application/json"} | headers)[:2]


def documents(hits: Sequence[Hit]) -> list[dict[str, str]]:
    return [{"id": hit.passage.id, "contents": hit.passage.contents} for hit in hits]


QUERIES = ["Who directed The Silver Harbor?", "Where is The Iron Crown set?"]


def test_a_client_of_search_r1(server: SearchServer, local: FaissRetriever) -> None:
    """The payload of its retrieval_request.py and of search_r1/llm_agent/generation.py, and what it reads of it."""
    payload = {"queries": QUERIES, "topk": 2, "return_scores": True}
    status, reply = post(server, "/retrieve", payload)
    assert status == 200
    expected = local.search(QUERIES, 2)
    for row, hits in zip(reply["result"], expected, strict=True):
        assert [doc_item["document"]["contents"] for doc_item in row] == [hit.passage.contents for hit in hits]
        assert [doc_item["score"] for doc_item in row] == [hit.score for hit in hits]
    assert post(server, "/retrieve", {"queries": QUERIES, "topk": 2})[1] == {"result": [documents(h) for h in expected]}
    own = {"result": [documents(hits) for hits in local.search(QUERIES, 3)]}
    assert post(server, "/retrieve", {"queries": QUERIES, "topk": None, "return_scores": False})[1] == own


def test_clients_of_r3rag(server: SearchServer, local: FaissRetriever) -> None:
    """Of its training and demo, one query, and of its benchmark, several; both read `contents` of each document."""
    expected = local.search(QUERIES, 3)
    status, reply = post(server, "/search", {"query": QUERIES[0]})
    assert status == 200 and [row["contents"] for row in reply] == [hit.passage.contents for hit in expected[0]]
    status, reply = post(server, "/search", {"querys": QUERIES})
    assert status == 200
    assert [[row["id"] for row in rows] for rows in reply] == [[hit.passage.id for hit in hits] for hits in expected]
    assert post(server, "/search", {"querys": []}) == (200, [])


def test_the_native_format(server: SearchServer, local: FaissRetriever) -> None:
    status, reply = post(server, "/v1/search", {"queries": QUERIES, "k": 2})
    rows = [[{**doc, "score": hit.score} for doc, hit in zip(documents(hits), hits, strict=True)] for hits in
            local.search(QUERIES, 2)]  # fmt: skip
    assert (status, reply) == (200, {"fingerprint": local.fingerprint, "results": rows})
    assert len(post(server, "/v1/search", {"queries": [""]})[1]["results"]) == 1
    assert post(server, "/v1/search", {"queries": QUERIES, "k": 2.0}) == (status, reply)  # JSON knows no difference
    status, info, _ = send(server, "GET", "/v1/index")
    assert status == 200 and info["fingerprint"] == local.fingerprint and info["num_passages"] == 216
    assert info["limits"] == LIMITS


@pytest.mark.parametrize(
    ("path", "body", "status", "rule"),
    [
        ("/v1/search", b"[" * 900, 400, "Invalid JSON: recursion limit exceeded"),
        ("/v1/search", b'{"queries": ["\xff"]}', 400, "Invalid JSON: invalid unicode code point"),
        ("/v1/search", b'{"queries": ["\\ud800"]}', 400, "Invalid JSON: "),
        ("/v1/search", b"", 400, "Invalid JSON: EOF"),
        ("/v1/search", b'{"queries": ["a"], "k": NaN}', 422, "k: Input should be a valid integer"),
        ("/v1/search", b'{"queries": ["a"], "k": ' + b"9" * 900 + b"}", 422, "k: "),
        ("/v1/search", ["a"], 422, 'the body: Input should be an object; got ["a"]'),
        ("/v1/search", {"queries": "a"}, 422, 'queries: Input should be a valid array; got "a"'),
        ("/v1/search", {"queries": ["a", 7]}, 422, "queries.1: Input should be a valid string; got 7"),
        ("/v1/search", {"queries": ["a"] * 5}, 422, "queries: "),
        ("/v1/search", {"queries": ["a" * 41]}, 422, "queries.0: String should have at most 40 characters; got"),
        ("/v1/search", {"queries": ["a"], "k": 10}, 422, "k: Input should be less than or equal to 9; got 10"),
        ("/v1/search", {"queries": ["a"], "k": 0}, 422, "k: Input should be greater than or equal to 1; got 0"),
        ("/v1/search", {"queries": ["a"], "k": True}, 422, "k: Input should be a valid integer; got true"),
        ("/v1/search", {"queries": ["a"] * 4, "k": 6}, 422, "at most 20 passages, queries times k; got 4 queries of 6"),
        ("/v1/search", {"queries": ["a"], "top": 3}, 422, "top: Extra inputs are not permitted; got 3"),
        ("/v1/search", {}, 422, "queries: Field required"),
        ("/retrieve", {"queries": ["a"], "topk": "3"}, 422, 'topk: Input should be a valid integer; got "3"'),
        ("/retrieve", {"query": "a"}, 422, "queries: Field required"),
        ("/search", {"query": None}, 422, "either query, a text, or querys, a list of texts"),
        ("/search", {"query": "a", "querys": ["b"]}, 422, "either query, a text, or querys, a list of texts"),
        ("/search", {"query": ["a"]}, 422, 'query: Input should be a valid string; got ["a"]'),
        ("/v1/search", b" " * 1001, 413, "a body holds at most 1000 bytes; got 1001"),
        ("/v1/search", b" " * 100_000, 413, "a body holds at most 1000 bytes; got 100000"),
    ],
)  # fmt: skip
def test_bodies_that_are_refused(server: SearchServer, path: str, body: Any, status: int, rule: str) -> None:
    got, reply = post(server, path, body)
    assert got == status and list(reply) == ["detail"]
    assert rule in reply["detail"] and len(reply["detail"]) < 400


def test_requests_that_are_refused(server: SearchServer) -> None:
    assert post(server, "/v1/search", {"queries": ["a"]}, **{"Content-Type": "text/plain"}) == (
        415,
        {"detail": "the header Content-Type must be application/json; got 'text/plain'"},
    )
    assert send(server, "GET", "/v1/search")[0] == 405
    assert send(server, "POST", "/v1/nothing", b"{}")[0] == 404
    assert send(server, "GET", "/docs")[0] == 404  # it would load scripts from elsewhere


def test_a_chunked_body_has_the_same_limit(server: SearchServer) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/search", iter([b" " * 600, b" " * 600]), headers, encode_chunked=True)
    with connection.getresponse() as reply:
        assert (reply.status, json.loads(reply.read())) == (
            413,
            {"detail": "a body holds at most 1000 bytes; got more than 1000"},
        )
    connection.close()


def test_a_body_that_drips_ends_at_its_deadline(local: FaissRetriever) -> None:
    with serving(local, body_timeout_s=0.2) as server, socket.create_connection(("127.0.0.1", port(server))) as drip:
        head = b"POST /v1/search HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
        drip.sendall(head + b'{"que')
        drip.settimeout(20)
        reply = b""
        while not reply.endswith(b"}"):
            reply += drip.recv(4096)
        assert reply.startswith(b"HTTP/1.1 408 ") and b"a whole body must come within 0.2 s; got 5 bytes" in reply


def test_metrics_count_requests_and_batches(local: FaissRetriever) -> None:
    with serving(local) as server:
        for path in ("/search", "/search", "/nowhere", "/else/where"):
            post(server, path, {"query": "a"})
        status, text, headers = send(server, "GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['r3rag_requests_total{path="/search",status="200"}'] == "2.0"
    assert lines['r3rag_requests_total{path="other",status="404"}'] == "2.0"
    assert lines["r3rag_batch_queries_count"] == lines["r3rag_search_seconds_count"] == "2.0"
    assert (lines["r3rag_ready"], lines["r3rag_in_flight_requests"]) == ("1.0", "1.0")


def test_a_token_is_asked_of_all_but_the_health_checks(local: FaissRetriever, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", " secret-1\n")
    with serving(local, token_env="MY_TOKEN") as server:
        for given in ({}, {"Authorization": "Bearer secret"}, {"Authorization": "secret-1"}, {"Authorization": "é"}):
            status, reply, headers = send(server, "GET", "/v1/index", **given)
            assert status == 401 and headers["www-authenticate"] == "Bearer" and "secret" not in reply["detail"]
            assert post(server, "/search", {"query": "a"}, **given)[0] == 401
        assert send(server, "GET", "/metrics")[0] == send(server, "GET", "/openapi.json")[0] == 401
        assert post(server, "/search", {"query": "a"}, Authorization="bearer secret-1")[0] == 200
        assert send(server, "GET", "/healthz")[0] == send(server, "GET", "/readyz")[0] == 200
    for wrong in ("", "two words", "é"):
        monkeypatch.setenv("MY_TOKEN", wrong)
        with pytest.raises(UserError, match="--token-env names MY_TOKEN: it must be set to visible ASCII characters"):
            with serving(local, token_env="MY_TOKEN"):
                pass


class Slow:
    """A retriever that waits until it is told to answer."""

    fingerprint = "slow"

    def __init__(self) -> None:
        self.is_searching, self.may_answer = threading.Event(), threading.Event()

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.is_searching.set()
        assert self.may_answer.wait(20)
        return [[] for _ in queries]


def test_it_answers_while_the_index_is_opened_and_searches_after() -> None:
    may_open, slow = threading.Event(), Slow()
    slow.may_answer.set()

    def open_it() -> Slow:
        assert may_open.wait(20)
        return slow

    with serving(open_it) as server:
        assert send(server, "GET", "/healthz")[:2] == (200, {"status": "ok"})
        for status, reply, headers in (
            send(server, "GET", "/readyz"), send(server, "GET", "/v1/index"),
            send(server, "POST", "/search", b"{}", **{"Content-Type": "application/json"}),
        ):  # fmt: skip
            assert (status, reply, headers["retry-after"]) == (503, {"detail": "the index is being opened"}, "1")
        may_open.set()
        server._batcher.opened.result(20)
        assert send(server, "GET", "/readyz")[0] == 200


def test_an_index_that_cannot_be_opened_ends_the_server(local: FaissRetriever) -> None:
    def open_it() -> FaissRetriever:
        raise UserError("no such index")

    server = SearchServer(open_it, IndexInfo("faiss", 216), ServeConfig(port=0))
    with pytest.raises(UserError, match="no such index"):
        server.run()
    with serving(local) as taken, pytest.raises(UserError, match=rf"--port {port(taken)} must be a free address"):
        SearchServer(open_it, IndexInfo("faiss", 216), ServeConfig(port=port(taken)))


def test_shutting_down_finishes_what_is_in_flight_and_refuses_what_is_new() -> None:
    slow = Slow()
    with ThreadPoolExecutor(1) as pool, serving(slow) as server:
        in_flight = pool.submit(post, server, "/search", {"query": "a"})
        assert slow.is_searching.wait(20)
        server.shut_down()
        status, reply, headers = send(
            server, "POST", "/search", b'{"query": "b"}', **{"Content-Type": "application/json"}
        )
        assert (status, reply) == (503, {"detail": "the server is shutting down"})
        assert (headers["retry-after"], headers["connection"]) == ("1", "close")
        assert send(server, "GET", "/readyz")[0] == 503 and send(server, "GET", "/healthz")[0] == 200
        slow.may_answer.set()
        assert in_flight.result(20) == (200, [])


def test_more_requests_than_may_be_in_flight_are_refused_for_a_moment() -> None:
    slow = Slow()
    with ThreadPoolExecutor(1) as pool, serving(slow, max_in_flight=1) as server:
        in_flight = pool.submit(post, server, "/search", {"query": "a"})
        assert slow.is_searching.wait(20)
        assert post(server, "/search", {"query": "b"}) == (503, {"detail": "at most 1 requests may be in flight"})
        assert send(server, "GET", "/readyz")[0] == 200
        slow.may_answer.set()
        assert in_flight.result(20) == (200, [])


def test_a_failed_search_says_why() -> None:
    class Broken(Slow):
        def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
            raise RuntimeError("the disk is gone")

    with serving(Broken()) as server:
        reply = post(server, "/search", {"query": "a"})
    assert reply == (500, {"detail": "the search failed: RuntimeError: the disk is gone"})

"""Requests that nobody means well: drawn from the OpenAPI document, and bytes of every kind."""

from __future__ import annotations

import collections
import http.client
import json
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from corpora import encyclopedia
from serving import serving

from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.faiss import FaissRetriever
from r3rag_jax.retrieval.server.run import SearchServer

pytestmark = pytest.mark.slow
MAX_BODY = 1_000_000
PATHS = ("/v1/search", "/retrieve", "/search")
SETTINGS = hypothesis.settings(deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
VALID = (
    {"queries": ["harbor", "Ünïcode \u2028"], "k": 3, "topk": 2, "return_scores": True},
    {"query": "harbor"},
    {"querys": ["harbor", ""]},
)


@pytest.fixture(scope="module")
def server() -> Iterator[SearchServer]:
    passages = encyclopedia()
    retriever = FaissRetriever.of(HashEncoder().fit(passage.contents for passage in passages), passages)
    with serving(retriever, max_body_bytes=MAX_BODY, max_query_chars=100) as running:
        yield running
        assert post(running, "/search", b'{"query": "harbor"}')[0] == 200  # it still searches


def post(server: SearchServer, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, Any]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    try:
        connection.request("POST", path, body, {"Content-Type": content_type})
        with connection.getresponse() as reply:
            return reply.status, json.loads(reply.read())
    finally:
        connection.close()


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_requests_drawn_from_the_document_are_answered_as_it_says(server: SearchServer, mode: str) -> None:
    """Schemathesis checks each answer: no 5xx, a documented status, type and schema; what is wrong is refused."""
    schemathesis = pytest.importorskip("schemathesis", reason="of the extra test")
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: collections.Counter[tuple[str, int]] = collections.Counter()
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(SETTINGS, max_examples=100)
        @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
        def check(case: Any) -> None:
            response = case.call_and_validate()
            statuses[case.path, response.status_code] += 1

        try:
            check()
        except hypothesis.errors.Unsatisfiable:
            assert mode == "NEGATIVE" and not operation.body, operation.label  # a GET cannot be wrong
    if mode == "POSITIVE":
        assert {path for path, status in statuses if status == 200} >= {*PATHS, "/v1/index", "/metrics"}
    else:
        assert {path for path, status in statuses if status in (400, 422)} >= set(PATHS)


def mutated() -> st.SearchStrategy[bytes]:
    """A valid body with some bytes replaced, cut out or repeated."""

    def change(body: dict[str, Any], edits: list[tuple[int, int, bytes]]) -> bytes:
        content = json.dumps(body, ensure_ascii=False).encode()
        for start, length, new in edits:
            start %= len(content) + 1
            content = content[:start] + new + content[start + length :]
        return content

    edit = st.tuples(st.integers(0, 200), st.integers(0, 9), st.binary(max_size=9))
    return st.builds(change, st.sampled_from(VALID), st.lists(edit, min_size=1, max_size=4))


def nested() -> st.SearchStrategy[bytes]:
    """JSON nested up to 30,000 deep, at the top or in a field."""
    opening = st.sampled_from([(b"[", b"]"), (b'{"a":', b"}"), (b'{"queries":[', b"]}")])

    def build(pair: tuple[bytes, bytes], depth: int, is_closed: bool, field: bytes) -> bytes:
        text = pair[0] * depth + b"1" + pair[1] * depth * is_closed
        return b'{"%s": %s}' % (field, text) if field else text

    fields = st.sampled_from([b"", b"queries", b"query", b"querys", b"k", b"other"])
    return st.builds(build, opening, st.integers(1, 3000), st.booleans(), fields)


@pytest.mark.parametrize("path", PATHS)
def test_bytes_of_every_kind_are_searched_for_or_refused_in_a_sentence(server: SearchServer, path: str) -> None:
    @hypothesis.settings(SETTINGS, max_examples=1000)
    @hypothesis.given(st.one_of(st.binary(max_size=300), mutated(), nested()))
    def check(body: bytes) -> None:
        status, reply = post(server, path, body)
        assert status in (200, 400, 413, 422), reply
        if status != 200:
            assert list(reply) == ["detail"] and 0 < len(reply["detail"]) < 1000

    check()


def test_huge_bodies_are_refused_at_any_size(server: SearchServer) -> None:
    for size in (MAX_BODY + 1, 4 * MAX_BODY, 50_000_000):
        try:
            status, reply = post(server, "/search", b" " * size)
        except ConnectionError:  # far beyond the limit the server hangs up
            assert size > 4 * MAX_BODY
        else:
            assert status == 413 and "a body holds at most 1000000 bytes" in reply["detail"]

"""Several servers that answer alike: turns, and what one that has failed is spared."""

from __future__ import annotations

from typing import Any

import pytest
from openai_server import chat, serve
from test_endpoint import BODY, PATH, Clock, open_at, said

from r3rag_jax.clients.replicas import Replicas
from r3rag_jax.config import ConfigError, EndpointConfig
from r3rag_jax.errors import UserError


def test_turns_and_rests() -> None:
    clock = Clock()
    replicas = Replicas(["a", "b", "c"], clock.now)
    assert [replicas.order() for _ in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    replicas.failed("b")
    assert [replicas.order() for _ in range(3)] == [list("ca"), list("ca"), list("ac")]
    clock.wait(1.0)  # the rest is over, and doubles with each further failure up to half a minute
    assert sorted(replicas.order()) == list("abc")
    for rest_s in (2, 4, 8, 16, 30, 30):
        replicas.failed("b")
        clock.wait(rest_s - 0.5)
        assert "b" not in replicas.order()
        clock.wait(0.5)
        assert "b" in replicas.order()
    replicas.failed("b")
    replicas.answered("b")
    assert "b" in replicas.order()
    for url in "abc":
        replicas.failed(url)
    assert sorted(replicas.order()) == list("abc")  # where all rest, all are asked


def test_requests_take_turns_and_a_server_that_dies_costs_no_wait() -> None:
    clock = Clock()
    with serve(lambda _: (200, chat("one"))) as one:
        with serve(lambda _: (200, chat("two"))) as two:
            endpoint = open_at(one.url, clock, replicas=(two.url + "/",))
            assert [said(endpoint.call(PATH, BODY)) for _ in range(4)] == ["one", "two"] * 2
        assert [said(endpoint.call(PATH, BODY)) for _ in range(4)] == ["one"] * 4
        assert clock.time == 100.0
        num_asked = len(one.bodies)
    with pytest.raises(UserError, match=rf"judge\.endpoint\.url: .*{PATH} failed, attempt 3 of 3: Connection refused"):
        endpoint.call(PATH, BODY)
    assert num_asked == 6 and clock.time == 100 + 1 + 2


def test_a_busy_server_is_left_out_until_it_answers_again() -> None:
    clock, is_busy = Clock(), True
    with serve(lambda _: (503, b"") if is_busy else (200, chat("one"))) as one:
        with serve(lambda _: (200, chat("two"))) as two:
            endpoint = open_at(one.url, clock, replicas=(two.url,))
            assert [said(endpoint.call(PATH, BODY)) for _ in range(6)] == ["two"] * 6
            assert len(one.bodies) == 1
            is_busy = False
            clock.wait(1.0)
            assert {said(endpoint.call(PATH, BODY)) for _ in range(2)} == {"one", "two"}


def test_a_refusal_of_one_is_that_of_all_and_names_its_key() -> None:
    with serve(lambda _: (200, chat("one"))) as one, serve(lambda _: (422, {"error": "no"})) as two:
        endpoint = open_at(one.url, replicas=(two.url,))
        endpoint.call(PATH, BODY)
        with pytest.raises(UserError, match=rf"judge\.endpoint\.replicas: {two.url}{PATH} answered 422"):
            endpoint.call(PATH, BODY)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"replicas": ("http://b",)}, "must have a url where it has replicas; got none"),
        ({"url": "http://a", "replicas": ("",)}, "replicas must be a list of URLs; got an empty one"),
        ({"url": "http://a", "replicas": ("ftp://b",)}, "replicas must be an http"),
        ({"url": "http://a", "replicas": ("http://u:secret@b",)}, "replicas must be an http"),
    ],
)
def test_replicas_are_urls(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        EndpointConfig(**fields)
    assert "secret" not in str(caught.value)
    assert EndpointConfig(url="http://a/", replicas=("http://b", "http://a")).urls == ("http://a", "http://b")

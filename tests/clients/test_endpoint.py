"""The HTTP client over real sockets: when a call is repeated, what ends it, and what no error message shows."""

from __future__ import annotations

import gc
import socket
import threading
import time
import weakref
from typing import Any

import pytest
from endpoints import BODY, PATH, Clock, config, failing, open_at, raw_server, said
from openai_server import MODEL, Reply, chat, serve

from r3rag_jax.clients.endpoint import Endpoint, RateLimit
from r3rag_jax.errors import UserError
from r3rag_jax.run.preemption import StopSignals

# ------------------------------------------------------------------------------------------ retries


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_a_busy_server_is_asked_again_after_doubling_waits(status: int) -> None:
    clock = Clock()
    with serve(failing(2, status)) as server:
        assert said(open_at(server.url, clock).call(PATH, BODY)) == "yes"
    assert server.bodies == [BODY] * 3 and clock.time == 100 + 1 + 2


def test_waits_grow_up_to_half_a_minute() -> None:
    clock = Clock()
    with serve(failing(8, 503)) as server:
        open_at(server.url, clock, retries=8).call(PATH, BODY)
    assert clock.time == 100 + 1 + 2 + 4 + 8 + 16 + 30 + 30 + 30


@pytest.mark.parametrize(
    ("header", "waited"), [("17", 17), ("0", 1), ("3600", 30), ("Wed, 21 Oct 2015 07:28:00 GMT", 1)]
)
def test_the_server_may_say_how_long_to_wait(header: str, waited: float) -> None:
    clock = Clock()
    with serve(failing(1, 429), {"Retry-After": header}) as server:
        open_at(server.url, clock).call(PATH, BODY)
    assert clock.time == 100 + waited


def test_a_server_that_keeps_failing_ends_in_one_line_with_the_key_and_the_url() -> None:
    with serve(lambda _: (500, b"out of\nmemory")) as server:
        with pytest.raises(UserError) as caught:
            open_at(server.url).call(PATH, BODY)
    assert str(caught.value) == (f"judge.endpoint.url: {server.url}{PATH} failed, attempt 3 of 3: 500 out of memory")
    assert len(server.bodies) == 3


def test_once_a_server_is_away_each_call_has_a_single_attempt() -> None:
    is_down = True
    with serve(lambda _: (503, b"") if is_down else (200, chat("yes"))) as server:
        endpoint = open_at(server.url, retries=3)
        with endpoint.session():
            for attempt in (4, 1, 1):
                with pytest.raises(UserError, match=rf"attempt {attempt} of 4: 503"):
                    endpoint.call(PATH, BODY)
            assert len(server.bodies) == 4 + 1 + 1
            is_down = False
            endpoint.call(PATH, BODY)
            is_down = True
            with pytest.raises(UserError, match="attempt 4 of 4"):  # it had answered
                endpoint.call(PATH, BODY)
        with endpoint.session(), pytest.raises(UserError, match="attempt 4 of 4"):
            endpoint.call(PATH, BODY)


def test_calls_that_are_given_up_are_not_repeated() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        endpoint.give_up()
        return 503, b"loading"

    with serve(reply) as server:
        endpoint = Endpoint(config(server.url, retries=5), name="judge.endpoint", first_wait_s=60)
        started = time.monotonic()
        with endpoint.session(), pytest.raises(UserError, match="attempt 1 of 6: 503 loading"):
            endpoint.call(PATH, BODY)
        assert time.monotonic() - started < 30  # the wait ended early
    assert len(server.bodies) == 1


def test_a_process_that_is_asked_to_stop_does_not_ask_again() -> None:
    stop = StopSignals()
    with serve(failing(9, 503)) as server, stop:
        stop._state.is_deferred = True
        stop._on(stop._state.on_note, "a preemption notice")
        with pytest.raises(UserError, match="attempt 1 of 3: 503"):
            open_at(server.url).call(PATH, BODY)
    with serve(failing(2, 503)) as server:
        assert said(open_at(server.url).call(PATH, BODY)) == "yes"


def test_requests_per_minute_hold_for_every_attempt() -> None:
    clock, starts = Clock(), []

    def reply(_: dict[str, Any]) -> Reply:
        starts.append(clock.time)
        return (503, b"") if len(starts) in (2, 3) else (200, chat("yes"))

    with serve(reply) as server:
        endpoint = open_at(server.url, clock, requests_per_minute=12)
        for _ in range(4):
            endpoint.call(PATH, BODY)
    assert starts == [100, 105, 110, 115, 120, 125]  # four calls, two of them again
    limit = RateLimit(12, clock.now)
    assert [limit.reserve() for _ in range(3)] == [0, 5, 10]  # three threads at once
    clock.wait(60)
    assert [limit.reserve() for _ in range(2)] == [0, 5]  # what was not used is not saved up


# ------------------------------------------------------------------------------- refusals and redirects


def test_a_refusal_is_not_repeated_and_says_what_may_help() -> None:
    with serve(lambda _: (422, {"error": "unknown field"})) as server:
        with pytest.raises(UserError) as caught:
            open_at(server.url).call(PATH, BODY)
    assert str(caught.value) == (
        f'judge.endpoint.url: {server.url}{PATH} answered 422 {{"error": "unknown field"}} (try less)'
    )
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_carries_the_key_nowhere(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-1")
    with serve(failing(0, 0)) as other:
        headers = {"Location": other.url + PATH, "Set-Cookie": "seen=1"}
        with serve(lambda _: (status, b"moved"), headers) as server:
            endpoint = open_at(server.url, key_env="MY_KEY")
            for _ in range(2):
                with pytest.raises(UserError, match=rf"judge\.endpoint\.url: .* answered {status} moved"):
                    endpoint.call(PATH, BODY)
    assert len(server.bodies) == 2 and other.bodies == []
    assert not any("Cookie" in headers for headers in server.headers)


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"judge\.endpoint\.key_env names the environment variable MY_KEY: it is not s"):
        open_at("http://x", key_env="MY_KEY")
    with pytest.raises(UserError, match=r"key_env names an environment variable: it is not set"):
        open_at("http://x", key_env="a1b2secret3")  # the key in place of its name
    key = 'secret-"1\\'
    monkeypatch.setenv("MY_KEY", key)
    for content in ({"error": f"no such key: {key}"}, f"no such key: {key}".encode()):
        with serve(lambda _, content=content: (401, content)) as server:  # type: ignore[misc]
            with pytest.raises(UserError) as caught:
                open_at(server.url, key_env="MY_KEY").call(PATH, BODY)
        assert "secret" not in str(caught.value) and "no such key: ***" in str(caught.value)
        assert "(judge.endpoint.key_env names the variable that holds the key)" in str(caught.value)
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
    monkeypatch.setenv("MY_KEY", "\tsecret-2\r\n")  # read from a file with its line end
    with serve(failing(0, 0)) as server:
        open_at(server.url, key_env="MY_KEY").call(PATH, BODY)
    assert server.headers[0]["Authorization"] == "Bearer secret-2"
    for wrong in ("secret 1", "secret\n1", "secret\x7f", "sécret"):
        monkeypatch.setenv("MY_KEY", wrong)
        with pytest.raises(UserError, match="MY_KEY: it must hold visible ASCII characters alone") as caught:
            open_at("http://x", key_env="MY_KEY")
        assert "cret" not in str(caught.value)


def test_without_a_key_none_is_sent() -> None:
    with serve(failing(0, 0)) as server:
        open_at(server.url).call(PATH, BODY)
    assert "Authorization" not in server.headers[0]


def test_urls_and_proxies_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"judge\.endpoint\.url: http://x:y cannot be called: Invalid port"):
        open_at("http://x:y")
    monkeypatch.setenv("all_proxy", "gopher://127.0.0.1:9")
    with pytest.raises(UserError, match=r"judge\.endpoint\.url: http://x cannot be called: .*proxy"):
        open_at("http://x")


# -------------------------------------------------------------------------------------------- replies


@pytest.mark.parametrize("content", [b"<html>", b"", b"[" * 100_000, b"\xff"])
def test_a_reply_must_be_json(content: bytes) -> None:
    with serve(lambda _: (200, content)) as server, pytest.raises(UserError) as caught:
        open_at(server.url).call(PATH, BODY)
    assert f"judge.endpoint.url: {server.url}{PATH} must answer JSON; got" in str(caught.value)
    assert len(server.bodies) == 1 and len(str(caught.value)) < 500


def test_the_model_is_the_configured_one_or_the_first_that_the_server_lists() -> None:
    with serve(failing(0, 0)) as server:
        assert open_at(server.url).model == "m"
        endpoint = open_at(server.url + "/", model="")
        assert endpoint.url == server.url
        assert endpoint.model == endpoint.model == MODEL
    assert endpoint.model == MODEL  # it is asked once
    with serve(failing(0, 0)) as server:
        endpoint = open_at(server.url.removesuffix("/v1"), model="")
        with pytest.raises(UserError, match=r"/models must answer a list of models; got \{\}"):
            _ = endpoint.model


def test_connections_are_used_again() -> None:
    together = threading.Barrier(3)

    def reply(body: dict[str, Any]) -> Reply:
        if body.get("together"):
            together.wait(timeout=20)
        return 200, chat("yes")

    with serve(reply) as server:
        endpoint = open_at(server.url)
        for _ in range(5):
            endpoint.call(PATH, BODY)
        assert (len(server.bodies), server.num_connections) == (5, 1)
        replies = dict(endpoint.call_all(lambda body: said(endpoint.call(PATH, body)), [BODY | {"together": 1}] * 3))
        assert replies == dict.fromkeys(range(3), "yes")
        assert server.num_connections == 3  # as many as were busy at once
        assert server.most_busy == 3


def test_an_endpoint_that_is_dropped_closes_its_connections() -> None:
    has_left = threading.Event()

    def handle(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        while connection.recv(65536):  # the request's body may come apart from its headers
            pass
        has_left.set()

    with raw_server(handle) as url:
        endpoint = open_at(url)
        assert endpoint.call(PATH, BODY) == {}
        seen = weakref.ref(endpoint)
        del endpoint
        gc.collect()
        assert seen() is None and has_left.wait(20)


# ---------------------------------------------------------------------------------------- many calls


def test_many_calls_are_in_flight_together_and_errors_come_in_their_place() -> None:
    together = threading.Barrier(4)  # breaks, and fails the test, unless four wait at once

    def reply(body: dict[str, Any]) -> Reply:
        together.wait(timeout=20)
        return (400, b"no") if body["number"] == 5 else (200, body["number"])

    def ask(number: int) -> int:
        return endpoint.call(PATH, {"messages": [], "number": number})

    with serve(reply) as server:
        endpoint = open_at(server.url, max_in_flight=4)
        replies = dict(endpoint.call_all(ask, range(8)))
    assert server.most_busy == 4
    assert "answered 400 no" in str(replies.pop(5)) and replies == {i: i for i in range(8) if i != 5}


def test_giving_up_ends_the_calls_that_wait() -> None:
    with serve(lambda _: (200, chat("yes"))) as server:
        endpoint = open_at(server.url, max_in_flight=1)
        for index, _ in endpoint.call_all(lambda _: endpoint.call(PATH, BODY), range(50)):
            assert index == 0
            endpoint.give_up()
    assert len(server.bodies) == 1


def test_a_caller_that_leaves_stops_the_calls() -> None:
    with serve(lambda _: (200, chat("yes"))) as server:
        endpoint = open_at(server.url, max_in_flight=1)
        replies = endpoint.call_all(lambda _: endpoint.call(PATH, BODY), range(50))
        next(replies)
        replies.close()
    assert len(server.bodies) == 1


def test_no_input_is_taken_before_a_result_is_consumed() -> None:
    """Threads that run ahead of a slow consumer would ask a server that is down long after it has seen enough."""
    with serve(lambda _: (200, chat("yes"))) as server:
        endpoint = open_at(server.url, max_in_flight=3)
        replies = endpoint.call_all(lambda _: endpoint.call(PATH, BODY), range(50))
        for num_consumed in range(4):
            next(replies)
            time.sleep(0.05)  # while the consumer works
            assert len(server.bodies) <= 3 + num_consumed
        replies.close()
    assert len(server.bodies) <= 3 + 3


def test_a_bug_in_a_call_is_raised_and_ends_the_others() -> None:
    def ask(number: int) -> int:
        if number == 0:
            raise KeyError("bug")
        return endpoint.call(PATH, BODY)

    with serve(lambda _: (200, chat("yes"))) as server:
        endpoint = open_at(server.url, max_in_flight=1)
        with pytest.raises(KeyError, match="bug"):
            list(endpoint.call_all(ask, range(50)))
    assert server.bodies == []

"""The HTTP client against servers that drip, flood, break off or do not listen."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from endpoints import BODY, PATH, Clock, failing, open_at, raw_server, receive_request
from openai_server import serve

from r3rag_jax.errors import UserError


def drip(connection: socket.socket, text: bytes) -> None:
    """Text again and again, a byte at a time."""
    while True:
        for byte in text:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)


HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
SLOW = {  # what comes at once, and what comes a byte at a time
    "silence": (b"", b""),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X-Slow: 1\r\n" * 1000),
    "body": (HEADERS + b"\r\n", b"1"),
    "length": (HEADERS + b"Content-Length: 99999\r\n\r\n", b"1"),
    "chunks": (HEADERS + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n1\r\n"),
}


@pytest.mark.parametrize("how", SLOW)
def test_a_server_that_drips_ends_at_the_deadline(how: str) -> None:
    """Each byte comes in time; the whole would take hours."""
    is_over = threading.Event()

    def handle(connection: socket.socket) -> None:
        receive_request(connection)
        at_once, slowly = SLOW[how]
        connection.sendall(at_once)
        if slowly:
            drip(connection, slowly)
        is_over.wait(20)

    clock = Clock()
    with raw_server(handle) as url:
        started = time.monotonic()
        with pytest.raises(UserError) as caught:
            open_at(url, clock, retries=1, timeout_s=0.4).call(PATH, BODY)
        is_over.set()
        assert 0.8 <= time.monotonic() - started < 10
    assert str(caught.value) == (
        f"judge.endpoint.url: {url}{PATH} failed, attempt 2 of 2: timed out after 0.4 s"
    )  # fmt: skip
    assert clock.time == 101  # it may have been a moment's trouble


@pytest.mark.parametrize("framing", ["", "Content-Length: 9999999999\r\n", "Transfer-Encoding: chunked\r\n"])
def test_a_reply_without_end_is_cut_off_at_the_size_limit(framing: str) -> None:
    num_sent = 0
    chunk = b" " * 10_000
    chunk = b"%x\r\n%s\r\n" % (len(chunk), chunk) if "chunked" in framing else chunk

    def handle(connection: socket.socket) -> None:
        nonlocal num_sent
        receive_request(connection)
        connection.sendall(HEADERS + framing.encode() + b"\r\n")
        while True:
            connection.sendall(chunk)
            num_sent += len(chunk)

    with raw_server(handle) as url, pytest.raises(UserError) as caught:
        open_at(url, max_reply_bytes=100_000).call(PATH, BODY)
    assert str(caught.value) == f"judge.endpoint.url: {url}{PATH} must answer at most 100000 bytes; got more"
    assert num_sent < 50_000_000  # what the buffers of both sides hold


def test_a_reply_as_large_as_the_limit_is_read() -> None:
    content = b'"' + b"x" * 998 + b'"'
    with serve(lambda _: (200, content)) as server:
        assert len(open_at(server.url, max_reply_bytes=1000).call(PATH, BODY)) == 998
        with pytest.raises(UserError, match="at most 999 bytes"):
            open_at(server.url, max_reply_bytes=999).call(PATH, BODY)


@pytest.mark.parametrize("drips", [True, False])
def test_a_refusal_stands_whatever_its_message(drips: bool) -> None:
    def handle(connection: socket.socket) -> None:
        receive_request(connection)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 999999\r\n\r\nno such field")
        if drips:
            drip(connection, b".")

    with raw_server(handle) as url, pytest.raises(UserError, match=r"answered 400 no such field\.*$"):
        open_at(url, timeout_s=1.0).call(PATH, BODY)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Server disconnected without sending a response"),
        (HEADERS + b"Content-Length: 10\r\n\r\n{", "peer closed connection"),
        (b"220 mail.example.org ESMTP\r\n\r\n", "illegal status line"),
    ],
)
def test_a_connection_that_breaks_off_is_tried_again(content: bytes, reason: str) -> None:
    num_connections = 0

    def handle(connection: socket.socket) -> None:
        nonlocal num_connections
        num_connections += 1
        receive_request(connection)
        connection.sendall(content)

    with raw_server(handle) as url, pytest.raises(UserError) as caught:
        open_at(url).call(PATH, BODY)
    assert f"judge.endpoint.url: {url}{PATH} failed, attempt 3 of 3: " in str(caught.value)
    assert reason in str(caught.value), caught.value
    assert num_connections == 3


def test_nobody_listens() -> None:
    with serve(failing(0, 0)) as server:
        endpoint = open_at(server.url, retries=1)
        endpoint.call(PATH, BODY)
    for name in ("127.0.0.1", "localhost"):
        url = server.url.replace("127.0.0.1", name)
        with pytest.raises(UserError) as caught:
            (endpoint if url == server.url else open_at(url, retries=1)).call(PATH, BODY)
        assert str(caught.value) == f"judge.endpoint.url: {url}{PATH} failed, attempt 2 of 2: Connection refused"

"""Endpoints without waits, and servers of raw sockets, for the tests of the HTTP client."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from openai_server import Reply, chat

from r3rag_jax.clients.endpoint import Endpoint
from r3rag_jax.config import EndpointConfig

BODY = {"messages": [{"role": "user", "content": "hello"}]}
PATH = "/chat/completions"


def config(url: str, **settings: Any) -> EndpointConfig:
    fields: dict[str, Any] = {"url": url, "model": "m", "max_in_flight": 4, "retries": 2, "timeout_s": 20.0}
    return EndpointConfig(**fields | settings)


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.time += seconds


def open_at(url: str, clock: Clock | None = None, max_reply_bytes: int = 1 << 20, **settings: Any) -> Endpoint:
    clock = clock or Clock()
    return Endpoint(
        config(url, **settings), name="judge.endpoint", hints={422: "try less"}, first_wait_s=1.0, wait=clock.wait,
        clock=clock.now, max_reply_bytes=max_reply_bytes,
    )  # fmt: skip


def said(reply: Any) -> str:
    return reply["choices"][0]["message"]["content"]


def failing(times: int, status: int) -> Callable[[dict[str, Any]], Reply]:
    left = iter(range(times))
    return lambda _: (status, {"error": "busy"}) if next(left, None) is not None else (200, chat("yes"))


def receive_request(connection: socket.socket) -> None:
    """Read a whole request, whose body may come apart from its headers: closing with unread bytes resets."""
    received, num_missing = b"", 1
    while num_missing > 0 and (chunk := connection.recv(65536)):
        received += chunk
        head, end, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        num_missing = int(length[1] if length else 0) - len(body) if end else 1


@contextlib.contextmanager
def raw_server(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """Speaks whatever `handle` writes to a connection, each in its thread."""
    is_over = False
    threads = []

    def serve_one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the client has left
            handle(connection)

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            if is_over:
                connection.close()
                return
            threads.append(threading.Thread(target=serve_one, args=(connection,)))
            threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            is_over = True
            socket.create_connection(("127.0.0.1", port)).close()
            for thread in [acceptor, *threads]:
                thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)

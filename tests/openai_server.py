"""A small OpenAI-compatible HTTP server in a thread, whose replies a test scripts."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any]  # status, and a JSON value or bytes as they stand
MODEL = "tiny"
PATHS = {"messages": "/v1/chat/completions", "input": "/v1/embeddings", "prompt": "/v1/completions"}


class RunningServer:
    """Where a server listens, and what it has been asked."""

    def __init__(self, url: str):
        self.url = url
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_busy = self.most_busy = 0  # requests in progress at the same time
        self.num_connections = 0


class Listener(ThreadingHTTPServer):
    """Answers from a thread for each connection."""

    request_queue_size = 64

    def __init__(self, reply: Callable[[dict[str, Any]], Reply], extra_headers: dict[str, str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.extra_headers = reply, extra_headers
        self.lock = threading.Lock()  # of what follows
        self.running = RunningServer(f"http://127.0.0.1:{self.server_port}/v1")
        self.connections: list[socket.socket] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that has left is no news
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Listener
    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.running.num_connections += 1
            self.server.connections.append(self.connection)

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": MODEL}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        if len(content := self.rfile.read(length)) < length:
            return  # the client was killed as it sent
        body, running = json.loads(content), self.server.running
        with self.server.lock:
            running.bodies.append(body)
            running.headers.append(dict(self.headers))
            running.num_busy += 1
            running.most_busy = max(running.most_busy, running.num_busy)
        try:
            assert self.path == next((path for name, path in PATHS.items() if name in body), None)
            status, value = self.server.reply(body)
        finally:
            with self.server.lock:
                running.num_busy -= 1
        self.answer(status, value)

    def answer(self, status: int, value: Any) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in self.server.extra_headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve(
    reply: Callable[[dict[str, Any]], Reply], extra_headers: dict[str, str] | None = None
) -> Iterator[RunningServer]:
    """`reply` answers the bodies of PATHS, from a thread each."""
    listener = Listener(reply, extra_headers or {})
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield listener.running
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()
        for connection in listener.connections:
            with contextlib.suppress(OSError):  # it is closed
                connection.shutdown(socket.SHUT_RDWR)


def completion(text: str, finish: str = "stop", **fields: Any) -> dict[str, Any]:
    """The reply of a server that tells no more than OpenAI's API asks for."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish} | fields]}


def chat(text: Any, finish: str = "stop") -> dict[str, Any]:
    """The reply of /v1/chat/completions."""
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}]}

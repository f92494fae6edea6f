"""A small HTTP server in a thread that speaks Search-R1's `POST /retrieve`."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from r3rag_jax.retrieval.base import Retriever

Reply = tuple[int, Any]  # status, and a JSON value or bytes as they stand


class RunningServer:
    """Where a server listens, and what it has been asked."""

    def __init__(self, url: str):
        self.url = url
        self.bodies: list[dict[str, Any]] = []


@contextlib.contextmanager
def serve(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[RunningServer]:
    """`reply` answers the bodies of /retrieve, from a thread each."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            running.bodies.append(body)
            status, value = reply(body) if self.path == "/retrieve" else (404, {"detail": "Not Found"})
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may have left
                self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    with Listener(("127.0.0.1", 0), Handler) as listener:
        running = RunningServer(f"http://127.0.0.1:{listener.server_address[1]}")
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        try:
            yield running
        finally:
            listener.shutdown()
            thread.join()


def search_with(retriever: Retriever) -> Callable[[dict[str, Any]], Reply]:
    """Answers as Search-R1's server does, from a retriever."""

    def reply(body: dict[str, Any]) -> Reply:
        rows = []
        for hits in retriever.search(body["queries"], body["topk"]):
            documents = [{"id": hit.passage.id, "contents": hit.passage.contents} for hit in hits]
            scored = [{"document": d, "score": hit.score} for d, hit in zip(documents, hits, strict=True)]
            rows.append(scored if body["return_scores"] else documents)
        return 200, {"result": rows}

    return reply

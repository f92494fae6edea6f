"""A retrieval server in Search-R1's format that fails at random: for `soak.py` and its test.

    python benchmarks/faulty_server.py [--seed 0] [--share 0.3] [--hang-s 2]

prints its URL and answers POST /retrieve until its standard input is closed. `--share` of the replies have a fault,
each kind as often as the others; GET /counts tells how many of each there were. Passages and ranking are the same for
every seed, so that `search` is what a reply without a fault holds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = "amber basil cedar delta ember fjord grove heath islet jetty knoll lagoon".split()
PASSAGES = [
    {"id": f"p{number}", "contents": f'"{a} {b}"\nThe {a} lies near the {b}, which others call passage {number}.'}
    for number, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS if a != b)
]
REPEATED = ("status 500", "status 503", "status 429", "hangs", "drips", "breaks off", "closes")  # a client asks again
FINAL = ("no JSON", "deep JSON", "no rows", "null rows", "no documents", "status 404")  # the search has failed
SLOW = "slow"  # the reply is late and right


def search(queries: Sequence[str], k: int) -> list[list[dict[str, str]]]:
    """The passages with the most words of each query, of equal ones the first."""
    wanted = [set(query.lower().split()) for query in queries]
    words = [set(passage["contents"].lower().replace('"', " ").split()) for passage in PASSAGES]
    orders = (sorted(range(len(PASSAGES)), key=lambda p: (-len(words[p] & want), p)) for want in wanted)
    return [[PASSAGES[p] for p in order[:k]] for order in orders]


class FaultyServer(ThreadingHTTPServer):
    """Chooses a fault, or none, for each request."""

    daemon_threads = True

    def __init__(self, seed: int, share: float, hang_s: float):
        super().__init__(("127.0.0.1", 0), Handler)
        self.share, self.hang_s = share, hang_s
        self.counts: Counter[str] = Counter()
        self._rng, self._lock = random.Random(seed), threading.Lock()

    def draw(self) -> str:
        """The kind of the next reply; "" is one without a fault."""
        with self._lock:
            kind = self._rng.choice((*REPEATED, *FINAL, SLOW)) if self._rng.random() < self.share else ""
            self.counts[kind or "none"] += 1
            return kind

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has left is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyServer

    def do_GET(self) -> None:
        self._answer(200, json.dumps(self.server.counts).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rows = [
            [{"document": passage, "score": 1.0} for passage in row] for row in search(body["queries"], body["topk"])
        ]
        content, kind = json.dumps({"result": rows}).encode(), self.server.draw()
        if kind.startswith("status"):
            self._answer(int(kind[7:]), b'{"detail": "a fault"}')
        elif kind == "closes":
            self.close_connection = True
        elif kind in ("hangs", "drips", "breaks off"):
            self._send_in_part(kind, content)
        else:
            time.sleep(0.3 if kind == SLOW else 0)
            self._answer(200, _broken(kind, content))

    def _answer(self, status: int, content: bytes) -> None:
        self._head(status, len(content))
        self.wfile.write(content)

    def _head(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send_in_part(self, kind: str, content: bytes) -> None:
        """A reply that never becomes whole."""
        self.close_connection = True
        self._head(200, len(content))
        for byte in content[:20] if kind == "drips" else ():
            self.wfile.write(bytes([byte]))
            time.sleep(self.server.hang_s / 10)
        if kind == "breaks off":
            self.wfile.write(content[: len(content) // 2])
        if kind == "hangs":
            time.sleep(self.server.hang_s)

    def log_message(self, *args: Any) -> None:
        """Nothing is logged."""


def _broken(kind: str, content: bytes) -> bytes:
    """A reply with status 200 that is none."""
    replies = {
        "no JSON": content[:-2],
        "deep JSON": b"[" * 200_000,
        "no rows": b'{"result": []}',
        "null rows": json.dumps({"result": [None] * content.count(b"[[")}).encode(),
        "no documents": content.replace(b'"contents"', b'"nothing"'),
    }
    return replies.get(kind, content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.3, help="of the replies that have a fault")
    parser.add_argument("--hang-s", type=float, default=2.0, help="seconds after which a reply that hangs is given up")
    args = parser.parse_args()
    with FaultyServer(args.seed, args.share, args.hang_s) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        sys.stdin.read()
        server.shutdown()


if __name__ == "__main__":
    main()

"""Many clients of a retrieval server: latency, throughput and errors, also while the server restarts.

    python benchmarks/serve.py INDEX [--clients 64] [--seconds 60] [--restarts 1] [retrieval.key=value …]

Starts `python -m r3rag_jax.serve` on INDEX in a process of its own. Each client is a `retrieval.kind=http` of its own
with one search after another, of one query about a passage drawn at random; all are threads of this process. Every
reply is compared with the first one to the same query: the same passages in the same order, and scores that differ by
rounding alone, because an encoder's sums depend on how many queries the server has batched. `--restarts` times, evenly
spread, the server gets SIGTERM and is started again on the same port, while the clients go on; their retries bridge it.

Prints requests, errors, replies that differ, and percentiles of a search in milliseconds: of those that met no restart,
and of all. A client counts an error when its retries are used up.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from r3rag_jax.config import RemoteRetrieverConfig
from r3rag_jax.retrieval.base import Hit, RetrievalError
from r3rag_jax.retrieval.http import HttpRetriever
from r3rag_jax.retrieval.store import PassageStore

PERCENTILES = (50, 95, 99, 100)
NUM_QUERIES = 1000  # different ones
ROUNDING = 1e-5  # by which the scores of equal replies may differ


class Server:
    """The server's process, and when it was away."""

    def __init__(self, words: Sequence[str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._words = [sys.executable, "-m", "r3rag_jax.serve", "--port", str(self.port), *words]
        self.away: list[tuple[float, float]] = []
        self._process = self._start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(self._words, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready"):
                return process
        raise SystemExit(f"the server ended with {process.wait()}")

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)

    def restart(self) -> None:
        began = time.monotonic()
        status = self.stop()
        assert status == 0, f"the server ended with {status}"
        self._process = self._start()
        self.away.append((began, time.monotonic()))


@dataclasses.dataclass
class Tally:
    """What the clients have seen; appended to from all threads."""

    searches: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # start, end
    errors: list[str] = dataclasses.field(default_factory=list)
    num_different: int = 0
    first: dict[str, list[Hit]] = dataclasses.field(default_factory=dict)


def is_equal(ours: Sequence[Hit], theirs: Sequence[Hit]) -> bool:
    """Whether two replies have the same passages, with the same scores but for rounding."""
    same = [hit.passage for hit in ours] == [hit.passage for hit in theirs]
    return same and np.allclose([hit.score for hit in ours], [hit.score for hit in theirs], rtol=0, atol=ROUNDING)


def search_on(url: str, arguments: argparse.Namespace, queries: Sequence[str], seed: int, tally: Tally) -> None:
    """One client: searches until the time is over."""
    config = RemoteRetrieverConfig(url=url, format=arguments.format, max_in_flight=1, retries=arguments.retries)
    retriever, generator = HttpRetriever(config), np.random.default_rng(seed)
    while (start := time.monotonic()) < arguments.ends:
        query = queries[generator.integers(len(queries))]
        try:
            [hits] = retriever.search([query], arguments.k)
        except RetrievalError as error:
            tally.errors.append(str(error))
            continue
        tally.searches.append((start, time.monotonic()))
        tally.num_different += not is_equal(hits, tally.first.setdefault(query, hits))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("index", type=Path, help="what r3rag_jax.index build has written")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--format", default="native", help="retrieval.endpoint.format")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--retries", type=int, default=8, help="retrieval.endpoint.retries")
    parser.add_argument("--batch-wait-ms", type=float, default=2.0, help="of the server")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of section `retrieval`, for the server")
    arguments = parser.parse_intermixed_args()
    store, generator = PassageStore(arguments.index), np.random.default_rng(0)
    positions = generator.choice(len(store), min(NUM_QUERIES, len(store)), replace=False)
    queries = [f"What is {store.at(position).title}?" for position in positions]
    server = Server([
        "--index", str(arguments.index), "--batch-wait-ms", str(arguments.batch_wait_ms), *arguments.overrides
    ])  # fmt: skip
    tally = Tally()
    HttpRetriever(RemoteRetrieverConfig(url=server.url, format=arguments.format)).search(queries[:64], arguments.k)
    arguments.ends = (began := time.monotonic()) + arguments.seconds
    clients = [
        threading.Thread(target=search_on, args=(server.url, arguments, queries, seed, tally))
        for seed in range(arguments.clients)
    ]
    for client in clients:
        client.start()
    for number in range(arguments.restarts):
        time.sleep(max(0.0, began + arguments.seconds * (number + 1) / (arguments.restarts + 1) - time.monotonic()))
        server.restart()
    for client in clients:
        client.join()
    seconds = time.monotonic() - began
    status = server.stop()
    show(tally, server, seconds, arguments)
    if tally.errors or tally.num_different or status:
        raise SystemExit(f"{len(tally.errors)} errors, the first: {tally.errors[:1]}; the server ended with {status}")


def show(tally: Tally, server: Server, seconds: float, arguments: argparse.Namespace) -> None:
    """Print the counts and the table of percentiles."""
    times = np.asarray(tally.searches)
    met = np.zeros(len(times), bool)
    for began, ended in server.away:
        met |= (times[:, 0] < ended) & (times[:, 1] > began)
    console = Console()
    console.print(
        f"{arguments.clients} clients, {seconds:.1f} s: {len(times)} searches, {len(times) / seconds:.0f} a second, "
        f"{len(tally.errors)} errors, {tally.num_different} different replies; the server was away "
        f"{', '.join(f'{ended - began:.1f} s' for began, ended in server.away) or 'never'}",
        highlight=False,
    )
    table = Table("searches", "count", *(f"p{p}" if p < 100 else "max" for p in PERCENTILES))
    for name, rows in (("that met no restart", times[~met]), ("all", times)):
        taken = 1000 * (rows[:, 1] - rows[:, 0]) if len(rows) else np.full(1, np.nan)
        table.add_row(name, str(len(rows)), *(f"{value:.1f}" for value in np.percentile(taken, PERCENTILES)))
    console.print(table)


if __name__ == "__main__":
    main()

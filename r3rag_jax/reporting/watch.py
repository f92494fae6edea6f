"""`report RUN --watch`: serves the page of a run on this machine and renews it as the run goes."""

from __future__ import annotations

import functools
import hashlib
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from r3rag_jax.errors import UserError
from r3rag_jax.reporting.report_page import Live, report_html
from r3rag_jax.reporting.run_files import load_run
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.status_lines import duration

HOST = "127.0.0.1"
PULL_S = 30.0  # a run in a bucket is copied at most so often


class WatchedRun:
    """The page of a run directory, made anew when its files have changed. Any thread may call."""

    def __init__(self, place: str, clock: Callable[[], float] = time.monotonic, every_ms: int = 3000):
        """Args: `every_ms`, how often a page asks whether there is something new.

        Raises:
            UserError: `place` is no run directory.
        """
        self._every_ms = every_ms
        self._place, self._clock, self._lock = place, clock, threading.Lock()
        self._run, self._pulled = RunDirectory.at(place), clock()
        self._html: tuple[str, str] = ("", "")  # version, page
        self.page()

    def version(self) -> str:
        """Changes whenever a file that the page shows has changed."""
        with self._lock:
            return self._version()

    def page(self) -> str:
        """The page as the files are now."""
        with self._lock:
            version = self._version()
            if self._html[0] != version:
                run = load_run(self._run)
                self._html = version, report_html(run, Live(version, progress_line(run.metrics), self._every_ms))
            return self._html[1]

    def _version(self) -> str:
        if self._run.store is not None and self._clock() - self._pulled > PULL_S:
            self._run, self._pulled = RunDirectory.at(self._place), self._clock()
        run = self._run
        tables, evals = run.path / "tables", run.evaluation_dir
        logs = (run.config_file, run.metrics_file, run.phases_file)
        shown = [*logs, *evals.glob("*.json"), *run.trajectory_dir.glob("*.jsonl")]
        marks = [_mark(path) for path in sorted([*shown, *tables.glob("*.json")])]
        return hashlib.sha256(repr(marks).encode()).hexdigest()[:16]


def _mark(path: Path) -> tuple[str, int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return path.name, 0, 0
    return path.name, found.st_size, found.st_mtime_ns


def progress_line(metrics: dict[str, list[dict[str, Any]]]) -> str:
    """How far a run is, e.g. `RL iteration 12, 40 s an iteration, 18 min left`."""
    if rows := metrics.get("rl"):
        row = rows[-1]
        parts = [f"RL iteration {row['step']} is done"]
        if "iteration_s" in row:
            parts.append(f"it took {row['iteration_s']:.1f} s")
        if row.get("eta_s"):
            parts.append(f"{duration(row['eta_s'])} left")
        return ", ".join(parts)
    if rows := metrics.get("sft"):
        return f"cold start: step {rows[-1]['step']} is done"
    return "no step is done yet"


def make_server(watched: WatchedRun, port: int) -> ThreadingHTTPServer:
    """A server of the page on the loopback address; port 0 takes a free one.

    Raises:
        UserError: the port is taken.
    """
    try:
        return ThreadingHTTPServer((HOST, port), functools.partial(_Handler, watched))
    except OSError as error:
        raise UserError(f"--port must be free on {HOST}; {port} cannot be used: {error.strerror}") from error


class _Handler(BaseHTTPRequestHandler):
    """Answers GET of /, /page and /version."""

    def __init__(self, watched: WatchedRun, *args: Any):
        self._watched = watched
        super().__init__(*args)

    def do_GET(self) -> None:
        """The page, or its version. Only under a name of this machine: another site's name may lead here, too."""
        host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        answers = {"/": self._watched.page, "/page": self._watched.page, "/version": self._watched.version}
        if host not in (HOST, "localhost") or self.path not in answers:
            self.send_error(HTTPStatus.FORBIDDEN if self.path in answers else HTTPStatus.NOT_FOUND)
            return
        try:
            body = answers[self.path]().encode("utf-8", "replace")
        except (UserError, OSError) as error:  # the run was removed, or its bucket is away
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
            return
        self.send_response(HTTPStatus.OK)
        kind = "text/plain" if self.path == "/version" else "text/html"
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests come every few seconds."""

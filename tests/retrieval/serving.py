"""The package's retrieval server on a free port, in a thread or in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from r3rag_jax.config.serving import ServeConfig
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.retrieval.server.app import IndexInfo
from r3rag_jax.retrieval.server.run import SearchServer

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def serving(retriever: Retriever | Callable[[], Retriever], **settings: Any) -> Iterator[SearchServer]:
    """A server that searches with the retriever, or with what the function opens; shut down at the end."""
    said: list[str] = []
    is_ready = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("ready") or callable(retriever):
            is_ready.set()

    opened = retriever if callable(retriever) else lambda: retriever
    config = ServeConfig(**{"port": 0, "batch_wait_ms": 0.0} | settings)
    server = SearchServer(opened, IndexInfo("faiss", 216), config, say)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert is_ready.wait(20)
        yield server
    finally:
        if thread.is_alive() and not server.application.gate.is_draining:
            server.shut_down()
        thread.join(20)
    assert not thread.is_alive()


def port(server: SearchServer) -> int:
    return int(server.url.rpartition(":")[2])


@contextlib.contextmanager
def server_process(index: Path, *words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, once it is ready, and its URL; ended by SIGTERM, with status 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "r3rag_jax.serve", "--index", str(index), "--port", "0", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert lines[1].startswith("ready at http://127.0.0.1:"), lines
        yield process, lines[1].split()[2].rstrip(":")
        if process.poll() is None:
            process.terminate()
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()

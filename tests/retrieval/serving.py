"""The package's retrieval server in a thread, on a free port."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from r3rag_jax.config.serving import ServeConfig
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.retrieval.server.app import IndexInfo
from r3rag_jax.retrieval.server.run import SearchServer


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

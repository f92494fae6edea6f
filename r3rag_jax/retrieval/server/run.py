"""The retrieval server of an index."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from r3rag_jax.config.serving import ServeConfig
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.retrieval.batching import Batcher
from r3rag_jax.retrieval.server.app import Application, IndexInfo
from r3rag_jax.retrieval.server.metrics import ServerMetrics
from r3rag_jax.serving.http_server import HttpServer


class SearchServer(HttpServer):
    """Searches one retriever; `/readyz` answers 200 once it is open."""

    def __init__(
        self,
        open_retriever: Callable[[], Retriever],
        info: IndexInfo,
        config: ServeConfig,
        say: Callable[[str], object] = lambda text: None,
    ):
        """
        Args:
            open_retriever: called once, while the server answers already.
            say: see `HttpServer`.

        Raises:
            UserError: see `HttpServer`.
        """
        super().__init__(config, say)
        metrics = ServerMetrics()
        self._batcher = Batcher(
            open_retriever, max_batch=config.max_batch, wait_s=config.batch_wait_ms / 1000,
            max_waiting=config.max_waiting, observer=metrics,
        )  # fmt: skip
        self.application = Application(self._batcher, info, config, self.token, metrics)
        self.gate = self.application.gate

    async def open(self) -> str:
        """See `HttpServer.open`."""
        self._batcher.start()
        await asyncio.wrap_future(self._batcher.opened)
        return "POST /v1/search, /retrieve (Search-R1), /search (R3-RAG)"

    def close(self) -> None:
        """See `HttpServer.close`."""
        self._batcher.close()

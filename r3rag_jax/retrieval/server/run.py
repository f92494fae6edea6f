"""Runs the server until a signal ends it: requests in flight are finished, new ones refused."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import uvicorn

from r3rag_jax.config.redact import VARIABLE
from r3rag_jax.config.serving import ServeConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.retrieval.server.app import Application, IndexInfo
from r3rag_jax.retrieval.server.batching import Batcher
from r3rag_jax.retrieval.server.metrics import ServerMetrics

POLL_S = 0.02  # between two looks at the requests in flight while the server shuts down
BACKLOG = 2048  # connections that wait to be accepted


class SearchServer:
    """A server that listens from its construction; `/readyz` answers 200 once the retriever is open.

    On the first SIGTERM or SIGINT `/readyz` and new requests are answered 503, requests in flight have `drain_s` to
    finish, and `run` returns. A second signal ends it at once.
    """

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
            say: is told where the server listens, and when it is ready.

        Raises:
            UserError: the token is not set, or the address is taken.
        """
        token = _read_token(config.token_env)
        self._config, self._say, self._listener = config, say, _listen(config)
        host, port = self._listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        metrics = ServerMetrics()
        self._batcher = Batcher(
            open_retriever, max_batch=config.max_batch, wait_s=config.batch_wait_ms / 1000,
            max_waiting=config.max_waiting, observer=metrics,
        )  # fmt: skip
        self.application = Application(self._batcher, info, config, token, metrics)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        # Its timeout is for connections: those of requests are waited for by `_drain`.
        self._server = _Uvicorn(
            uvicorn.Config(
                self.application.gate, log_config=None, access_log=False, lifespan="off", server_header=False,
                timeout_graceful_shutdown=1,
            ),
            self.shut_down,
        )  # fmt: skip

    def run(self) -> None:
        """Serve until a signal, or `shut_down`.

        Raises:
            UserError: the retriever cannot be opened.
        """
        try:
            asyncio.run(self._serve())
        finally:
            self._listener.close()
            self._batcher.close()
        if self._batcher.opened.done():
            self._batcher.opened.result()  # raises what kept it from opening

    def shut_down(self) -> None:
        """Finish the requests in flight and end; called again, end at once. May be called from any thread."""
        if self.application.gate.is_draining:
            self._server.should_exit = self._server.force_exit = True
            return
        self.application.gate.is_draining = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._start, self._drain)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._say(f"listening at {self.url}; opening the index")
        self._batcher.start()
        self._start(self._report)
        await self._server.serve(sockets=[self._listener])

    def _start(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._tasks.append(asyncio.ensure_future(function()))

    async def _report(self) -> None:
        """Say when the server is ready; end it when its retriever cannot be opened."""
        try:
            await asyncio.wrap_future(self._batcher.opened)
            self._say(f"ready at {self.url}: POST /v1/search, /retrieve (Search-R1), /search (R3-RAG)")
        except Exception:
            self._server.should_exit = True  # `run` raises it

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._config.drain_s):
                while self.application.gate.num_in_flight:
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            self._say(f"{self.application.gate.num_in_flight} requests in flight are given up after --drain-s")
        self._server.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn, whose signals are ours to handle; its own would refuse connections while requests are in flight."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]):
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal()


def _listen(config: ServeConfig) -> socket.socket:
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UserError(f"--host {config.host} --port {config.port} must be a free address; got {error}") from None


def _read_token(name: str) -> str:
    """The bearer token in an environment variable, without blanks around it; empty: none is asked."""
    if not name:
        return ""
    token = os.environ.get(name, "").strip()
    shown = name if VARIABLE.fullmatch(name) else "an environment variable"
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"--token-env names {shown}: it must be set to visible ASCII characters without blanks")
    return token

"""Runs a server until a signal ends it: requests in flight are finished, new ones refused."""

from __future__ import annotations

import abc
import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import uvicorn

from r3rag_jax.config.redact import VARIABLE
from r3rag_jax.config.serving import ListenConfig
from r3rag_jax.errors import UserError
from r3rag_jax.serving.gate import Gate

POLL_S = 0.02  # between two looks at the requests in flight while the server shuts down
BACKLOG = 2048  # connections that wait to be accepted


class HttpServer(abc.ABC):
    """A server that listens from its construction, and is opened while it answers its health checks already.

    On the first SIGTERM or SIGINT `/readyz` and new requests are answered 503, requests in flight have `drain_s` to
    finish, and `run` returns. A second signal ends it at once.
    """

    gate: Gate  # the application; set by the constructors of subclasses

    def __init__(self, config: ListenConfig, say: Callable[[str], object]):
        """
        Args:
            say: is told where the server listens, and when it is ready.

        Raises:
            UserError: the token is not set, or the address is taken.
        """
        self.token = read_token(config.token_env)
        self._config, self._say, self._listener = config, say, _listen(config)
        host, port = self._listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._uvicorn: _Uvicorn | None = None
        self._failure: BaseException | None = None

    @abc.abstractmethod
    async def open(self) -> str:
        """Open what requests need; return what the server can do, for the user.

        An exception ends the server.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close what `open` has opened, or has begun to open."""

    def run(self) -> None:
        """Serve until a signal, or `shut_down`.

        Raises:
            UserError: it cannot be opened.
        """
        # Its timeout is for connections: those of requests are waited for by `_drain`.
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                self.gate, log_config=None, access_log=False, lifespan="off", server_header=False,
                timeout_graceful_shutdown=1,
            ),
            self.shut_down,
        )  # fmt: skip
        try:
            asyncio.run(self._serve(self._uvicorn))
        finally:
            self._listener.close()
            self.close()
        if self._failure is not None:
            raise self._failure

    def shut_down(self) -> None:
        """Finish the requests in flight and end; called again, end at once. May be called from any thread."""
        if self.gate.is_draining and self._uvicorn is not None:
            self._uvicorn.should_exit = self._uvicorn.force_exit = True
            return
        self.gate.is_draining = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._start, self._drain)

    async def _serve(self, server: _Uvicorn) -> None:
        self._loop = asyncio.get_running_loop()
        self._say(f"listening at {self.url}; opening")
        self._start(self._open)
        await server.serve(sockets=[self._listener])

    def _start(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._tasks.append(asyncio.ensure_future(function()))

    async def _open(self) -> None:
        """Say when the server is ready; end it when it cannot be opened."""
        assert self._uvicorn is not None
        try:
            self._say(f"ready at {self.url}: {await self.open()}")
        except Exception as error:
            self._failure = error
            self._uvicorn.should_exit = True

    async def _drain(self) -> None:
        assert self._uvicorn is not None
        try:
            async with asyncio.timeout(self._config.drain_s):
                while self.gate.num_in_flight:
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            self._say(f"{self.gate.num_in_flight} requests in flight are given up after --drain-s")
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn, whose signals are ours to handle; its own would refuse connections while requests are in flight."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]):
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal()


def _listen(config: ListenConfig) -> socket.socket:
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UserError(f"--host {config.host} --port {config.port} must be a free address; got {error}") from None


def read_token(name: str) -> str:
    """The bearer token in an environment variable, without blanks around it; empty: none is asked."""
    if not name:
        return ""
    token = os.environ.get(name, "").strip()
    shown = name if VARIABLE.fullmatch(name) else "an environment variable"
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"--token-env names {shown}: it must be set to visible ASCII characters without blanks")
    return token

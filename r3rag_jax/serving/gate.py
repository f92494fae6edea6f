"""What every request passes before its route: draining, token, size and deadline of the body; and its counting."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from r3rag_jax.config.serving import ListenConfig
from r3rag_jax.serving.metrics import OTHER, RequestMetrics
from r3rag_jax.serving.refusal import Refusal, busy

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/healthz", "/readyz")
MAX_DISCARDED = 4  # times max_body_bytes that are read and dropped, so that the client gets to read the refusal


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: App,
        config: ListenConfig,
        token: str,
        metrics: RequestMetrics,
        paths: Collection[str],
        open_paths: Collection[str] = OPEN_PATHS,
    ):
        """
        Args:
            token: the bearer token of all requests; empty: none is asked.
            paths: of the routes, which metrics name.
            open_paths: of the routes that are answered without a token, and while the server shuts down.
        """
        self._app, self._config, self._token, self._metrics = app, config, token.encode(), metrics
        self._paths, self._open_paths = frozenset(paths), frozenset(open_paths)
        self.num_in_flight = 0  # requests, without those of `open_paths`
        self.is_draining = False

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path, started_s, status = scope["path"], time.monotonic(), 500
        counts = path not in self._open_paths

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.is_draining:
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        self.num_in_flight += counts
        try:
            await self._pass(scope, receive, send_on, is_open=not counts)
        finally:
            self.num_in_flight -= counts
            self._metrics.answered(path if path in self._paths else OTHER, status, time.monotonic() - started_s)
        return None

    async def _pass(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, *, is_open: bool) -> None:
        try:
            if not is_open:
                if self.is_draining:
                    raise busy("the server is shutting down")
                self._check_token(scope)
                if self.num_in_flight > self._config.max_in_flight:
                    raise busy(f"at most {self._config.max_in_flight} requests may be in flight")
            body = await self._read_body(scope, receive)
        except Refusal as refusal:
            return await refuse(refusal, send)
        if body is None:
            return None  # the client has left
        has_been_read = False

        async def receive_again() -> Message:
            nonlocal has_been_read
            if has_been_read:
                return await receive()
            has_been_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self._app(scope, receive_again, send)

    def _check_token(self, scope: MutableMapping[str, Any]) -> None:
        if not self._token:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            raise Refusal(401, "the header Authorization must be `Bearer` and the server's token")

    async def _read_body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes | None:
        """The whole body, None where the client leaves before its end."""
        limit, body, num_bytes = self._config.max_body_bytes, bytearray(), 0
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        announced = int(length) if length.isdigit() and len(length) < 20 else 0
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    num_bytes += len(chunk)
                    if num_bytes <= limit:
                        body += chunk
                    is_over = not message.get("more_body", False)
                    if num_bytes > limit and (is_over or max(num_bytes, announced) > MAX_DISCARDED * limit):
                        got = f"{announced}" if announced > limit else f"more than {limit}"
                        raise Refusal(413, f"a body holds at most {limit} bytes; got {got}")
                    if is_over:
                        return bytes(body)
        except TimeoutError:
            rule = f"a whole body must come within {self._config.body_timeout_s:g} s; got {num_bytes} bytes"
            raise Refusal(408, rule) from None


async def refuse(refusal: Refusal, send: Send) -> None:
    """Answer with a refusal."""
    headers = {**refusal.headers, "content-length": str(len(refusal.body))}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": refusal.body})

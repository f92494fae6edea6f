"""One HTTP request and its reply, within a deadline and a size limit.

A timeout of httpx bounds each read: a server that sends one byte a second never exceeds it. `asyncio.timeout` bounds
the whole exchange, from connecting to the last byte. The requests therefore run on an event loop in a thread of its
own, which all transports of a process share; callers stay synchronous and may be many threads.
"""

from __future__ import annotations

import asyncio
import dataclasses
import http.cookiejar
import os
import socket
import ssl
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

MAX_REPLY_BYTES = 64 << 20
MAX_REFUSAL_BYTES = 64 << 10  # of the body that comes with an error status: more than an error message shows
# An idle connection is closed after so many seconds. Servers close theirs after 5 (uvicorn) or more, and a request
# that meets the server's closing would fail.
KEEPALIVE_S = 2.0
CONNECT_S = 10.0  # a host that is gone answers no SYN, and the next replica is asked


class TransportError(Exception):
    """No whole reply came: the server refused the connection, reset it, or exceeded the deadline. May be retried."""


class ReplyTooLargeError(Exception):
    """The reply exceeds the size limit."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the server answered."""

    status: int
    headers: Mapping[str, str]  # names in any case
    content: bytes

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


class Transport:
    """A pool of connections, for many threads.

    Redirects are not followed: the request's key would be sent to another host. Cookies are not kept: those of a load
    balancer would send all requests to one of its replicas.
    """

    def __init__(self, headers: Mapping[str, str], *, timeout_s: float, max_bytes: int = MAX_REPLY_BYTES):
        """
        Args:
            headers: sent with every request.
            timeout_s: longest exchange of a request and its whole reply, seconds.
            max_bytes: size limit of a reply.

        Raises:
            ValueError: the proxy that the environment names cannot be used.
        """
        self._timeout_s, self._max_bytes = timeout_s, max_bytes
        try:
            self._client = httpx.AsyncClient(
                headers={"Accept-Encoding": "identity"} | dict(headers),  # the size limit would not see what unpacks
                timeout=httpx.Timeout(None, connect=CONNECT_S),
                follow_redirects=False,
                cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
                limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S),
                verify=ssl.create_default_context(),  # the system's certificates, or those of SSL_CERT_FILE
            )
        except ImportError as error:  # a SOCKS proxy
            raise ValueError(error) from None
        weakref.finalize(self, _submit, self._client.aclose).atexit = False

    def send(
        self, method: str, url: str, content: bytes | None = None, on_chunk: Callable[[bytes], None] | None = None
    ) -> Reply:
        """Send a request and wait for the reply.

        Args:
            on_chunk: called in another thread with every piece of a successful reply when it comes; what it raises
                ends the exchange, and is raised here.

        Raises:
            TransportError: no whole reply came within `timeout_s`.
            ReplyTooLargeError: the reply holds more than `max_bytes`.
        """
        future = _submit(self._exchange, method, url, content, on_chunk)
        try:
            return future.result()
        except httpx.HTTPError as error:
            raise TransportError(_reason(error)) from None
        except TimeoutError:
            raise TransportError(f"timed out after {self._timeout_s:g} s") from None
        finally:
            future.cancel()  # the caller was interrupted

    async def _exchange(
        self, method: str, url: str, content: bytes | None, on_chunk: Callable[[bytes], None] | None
    ) -> Reply:
        response = None
        body = bytearray()
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream(method, url, content=content) as response,
            ):
                max_bytes = self._max_bytes if response.is_success else MAX_REFUSAL_BYTES
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > max_bytes:
                        break
                    if on_chunk is not None and response.is_success:
                        on_chunk(chunk)
        except (httpx.HTTPError, TimeoutError):
            if response is None or response.is_success:
                raise  # else the status stands, whatever became of the error message
        if response.is_success and len(body) > self._max_bytes:
            raise ReplyTooLargeError
        return Reply(response.status_code, response.headers, bytes(body))


def _reason(error: BaseException) -> str:
    """The error of the operating system beneath one of httpx, whose message may be a mere "All attempts failed"."""
    reason = str(error) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BaseExceptionGroup):  # an attempt for each address of the host
            cause = cause.exceptions[0]
        if isinstance(cause, ssl.SSLError | socket.gaierror):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno is not None:
            return os.strerror(cause.errno)  # asyncio's own text lacks it
        cause = cause.__cause__ or cause.__context__  # httpcore raises `from None`
    return reason


# ---- the event loop

_loop: asyncio.AbstractEventLoop | None = None
_loop_lock = threading.Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    """The process's loop; the first call starts it."""
    global _loop
    with _loop_lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="r3rag-http", daemon=True).start()
        return _loop


def _submit(function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
    """Run a coroutine function on the event loop."""
    return asyncio.run_coroutine_threadsafe(function(*args), _event_loop())

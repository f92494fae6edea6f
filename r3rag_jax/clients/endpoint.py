"""A server that speaks JSON over HTTP, or several that answer alike: calls are repeated while they are busy or away.

All clients share it: key, retries, rate limit, concurrency and error messages are defined here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import httpx

from r3rag_jax.clients.replicas import Replicas
from r3rag_jax.clients.streamed_reply import StreamedReply
from r3rag_jax.clients.transport import MAX_REPLY_BYTES, Reply, ReplyTooLargeError, Transport, TransportError
from r3rag_jax.config import EndpointConfig
from r3rag_jax.config.redact import VARIABLE
from r3rag_jax.errors import ServiceError, UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.run.counters import count_event
from r3rag_jax.run.preemption import is_asked_to_stop

T = TypeVar("T")
U = TypeVar("U")

RETRIED_STATUSES = frozenset((408, 409, 429, 500, 502, 503, 504, 529))  # the server is busy or broken for the moment
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 30.0  # before the first retry; doubled for each further one, up to the maximum
MAX_SHOWN = 300  # characters of a reply in an error message


class RateLimit:
    """Spaces the starts of requests by at least 60 / per_minute seconds, whichever thread makes them."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._gap_s, self._clock = 60 / per_minute, clock
        self._lock = threading.Lock()
        self._next = clock()

    def reserve(self) -> float:
        """Reserve the next free start; returns the seconds until then."""
        with self._lock:
            now = self._clock()
            start = max(now, self._next)
            self._next = start + self._gap_s
            return start - now


class Endpoint:
    """One server and its replicas; its methods may be called from many threads."""

    def __init__(
        self,
        config: EndpointConfig,
        *,
        name: str,
        hints: Mapping[int, str] | None = None,
        first_wait_s: float = FIRST_WAIT_S,
        wait: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_reply_bytes: int = MAX_REPLY_BYTES,
    ):
        """
        Args:
            config: `url` and `replicas` are the bases of all paths, e.g. http://localhost:8000/v1.
            name: the configuration section, e.g. `judge.endpoint`; error messages begin with its key.
            hints: HTTP status of a refusal -> what may help.
            first_wait_s: seconds before the first retry.
            wait: waits so many seconds, and `clock` reads the time in seconds; a test may bring its own. The default
                wait ends early when `give_up` is called.
            max_reply_bytes: a larger reply is an error.

        Raises:
            UserError: the URL is invalid, or the environment variable of the key is not set.
        """
        self._config, self._name = config, name
        self._replicas = Replicas(config.urls, clock)
        self._first_wait_s, self._max_reply_bytes = first_wait_s, max_reply_bytes
        self._hints = dict.fromkeys((401, 403), f"{name}.key_env names the variable that holds the key")
        self._hints |= dict(hints or {})
        self._key = read_key(config.key_env, name)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        url = ""
        try:
            for url in reversed(config.urls):
                httpx.URL(url)
            self._transport = Transport(headers, timeout_s=config.timeout_s, max_bytes=max_reply_bytes)
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"{self._key_of(url)}: {url} cannot be called: {error}") from None
        self._limit = RateLimit(config.requests_per_minute, clock) if config.requests_per_minute else None
        self._has_given_up = threading.Event()
        self._wait = self._has_given_up.wait if wait is None else wait
        self._is_away = False  # a call has run out of its retries, and none has been answered since
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The base URLs, for error messages."""
        return str(self._replicas)

    @property
    def model(self) -> str:
        """The configured model, or the first that the server lists.

        Raises:
            UserError: the server must be asked and does not answer.
        """
        if self._config.model:
            return self._config.model
        with self._lock:
            return self._first_model

    @functools.cached_property
    def _first_model(self) -> str:
        reply = self.call("/models")
        try:
            name = reply["data"][0]["id"]
        except (KeyError, IndexError, TypeError):
            name = None
        if not isinstance(name, str):
            raise self.malformed("/models", "a list of models", reply)
        return name

    # ---- one call

    def call(self, path: str, body: Mapping[str, Any] | None = None, streamed: StreamedReply | None = None) -> Any:
        """POST a body (GET without one); returns the JSON reply.

        Servers take turns; where one is busy, broken or away the next is asked. When all have failed the request is
        repeated after doubling waits. Once a call has run out of its retries, every further one of the session has a
        single attempt until one is answered: the servers have had their time, and hundreds of calls that each wait
        their turn would take hours to say so. So has a call of a process that has been asked to stop.

        Args:
            streamed: hears the reply as it comes, and joins it.

        Raises:
            ServiceError: all servers keep failing, or the reply is no JSON or too large.
            UserError: a server refuses.
        """
        content = None if body is None else json.dumps(body).encode()
        num_attempts = 1 if self._is_away else self._config.retries + 1
        asked, attempt, reason = self.url, 0, "given up before it was asked"
        for attempt in range(num_attempts):
            least_wait_s = 0.0
            for url in self._replicas.order():
                if self._limit is not None and self.pause(self._limit.reserve()):
                    break
                reply, reason = self._send(url, path, content, streamed)
                asked = url
                if reply is not None and reply.status not in RETRIED_STATUSES:
                    self._replicas.answered(url)
                    self._is_away = False
                    return self._read(url, path, reply, streamed)
                self._replicas.failed(url)
                count_event(f"{self._name} failed")
                least_wait_s = _seconds(reply.headers.get("Retry-After", "")) if reply is not None else 0.0
            if attempt == self._config.retries:
                self._is_away = True
            wait_s = min(MAX_WAIT_S, max(least_wait_s, self._first_wait_s * 2**attempt))
            if attempt == num_attempts - 1 or is_asked_to_stop() or self.pause(wait_s):
                break
        raise ServiceError(
            f"{self._name}.url: {asked}{path} failed, attempt {attempt + 1} of {self._config.retries + 1}: {reason}"
        )

    def _send(
        self, url: str, path: str, content: bytes | None, streamed: StreamedReply | None
    ) -> tuple[Reply | None, str]:
        """The reply, None where none came, and why the call has failed if the reply is to be retried."""
        if streamed is not None:
            streamed.restart()
        try:
            reply = self._transport.send(
                "GET" if content is None else "POST", url + path, content, None if streamed is None else streamed.feed
            )
            return reply, f"{reply.status} {self.shown(reply.content)}"
        except TransportError as error:
            return None, self.shown(str(error).encode())
        except ReplyTooLargeError:
            rule = f"at most {self._max_reply_bytes} bytes; got more"
            raise ServiceError(f"{self._key_of(url)}: {url}{path} must answer {rule}") from None

    def _read(self, url: str, path: str, reply: Reply, streamed: StreamedReply | None) -> Any:
        """The JSON of an answer that is not to be retried."""
        if not reply.is_success:
            hint = f" ({self._hints[reply.status]})" if reply.status in self._hints else ""
            answer = f"{reply.status} {self.shown(reply.content)}"
            raise UserError(f"{self._key_of(url)}: {url}{path} answered {answer}{hint}")
        try:
            return parse_json(reply.content) if streamed is None else streamed.join(reply.content)
        except ValueError:
            raise self.malformed(path, "JSON", reply.content) from None

    def malformed(self, path: str, rule: str, reply: Any) -> ServiceError:
        """The error for a reply that breaks a rule."""
        return ServiceError(f"{self._name}.url: {self.url}{path} must answer {rule}; got {self.shown(reply)}")

    def _key_of(self, url: str) -> str:
        """The configuration key that holds a base URL."""
        return f"{self._name}.{'url' if url == self._config.urls[0] else 'replicas'}"

    def shown(self, reply: Any) -> str:
        """A reply (bytes or a JSON value) as one short text, without the key, which a server may echo."""
        text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else json.dumps(reply)
        for key in {self._key, json.dumps(self._key)[1:-1]} - {""}:
            text = text.replace(key, "***")
        return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"

    def pause(self, seconds: float) -> bool:
        """Wait, at most until the session's calls are given up; returns whether they are."""
        self._wait(seconds)
        return self._has_given_up.is_set()

    # ---- many calls

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """A session of calls, with its own retries; an exception inside ends the retries of those in flight."""
        self._has_given_up.clear()
        self._is_away = False
        try:
            yield
        except BaseException:
            self.give_up()
            raise

    def separate(self) -> Endpoint:
        """This endpoint with a session of its own, for one of several threads that call it.

        Connections, rate limit and the health of the servers are shared; giving up ends the calls of one session alone.
        """
        other = copy.copy(self)
        other._has_given_up, other._is_away = threading.Event(), False
        if self._wait == self._has_given_up.wait:
            other._wait = other._has_given_up.wait
        return other

    def give_up(self) -> None:
        """End the retries of the session's calls; `call_all` starts no further ones."""
        self._has_given_up.set()

    def call_all(self, function: Callable[[T], U], inputs: Sequence[T]) -> Iterator[tuple[int, U | UserError]]:
        """Apply a function that calls this endpoint to all inputs, `max_in_flight` of them at a time, in one session.

        Yields the index of an input and its result, or the UserError that it raised, in the order of arrival. A further
        input is taken only when a result has been consumed. After `give_up` no more are taken; those in flight still
        yield their results.
        """
        num_threads = self._config.max_in_flight
        waiting = iter(enumerate(inputs))
        futures: dict[Future[U], int] = {}
        with ThreadPoolExecutor(num_threads) as pool, self.session():  # a caller that leaves ends the session
            while True:
                if not self._has_given_up.is_set():
                    for index, one in itertools.islice(waiting, num_threads - len(futures)):
                        futures[pool.submit(function, one)] = index
                if not futures:
                    return
                wait(futures, return_when=FIRST_COMPLETED)
                future = next(future for future in futures if future.done())
                error = future.exception()
                yield futures.pop(future), error if isinstance(error, UserError) else future.result()


def read_key(key_env: str, name: str) -> str:
    """The API key in an environment variable, without blanks around it (`export KEY="$(cat file)"`); empty: none."""
    if not key_env:
        return ""
    is_name = VARIABLE.fullmatch(key_env) is not None  # else a key may have been put in its place
    shown = f"the environment variable {key_env}" if is_name else "an environment variable"
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise UserError(f"{name}.key_env names {shown}: it is not set")
    if not (key.isascii() and key.isprintable()) or " " in key:  # the error of a refused header would show it
        raise UserError(f"{name}.key_env names {shown}: it must hold visible ASCII characters alone")
    return key


def _seconds(text: str) -> float:
    """The seconds of a Retry-After header; its other form, a date, counts as none."""
    return float(text) if text.isdecimal() else 0.0

"""A model server that speaks OpenAI's API over HTTP: JSON out, JSON in, calls repeated while it is busy or away.

What the sampler of rollouts (`sampler/server.py`) and a judge (`sampler/chat.py`) share: key, retries, rate,
errors. The standard library is enough, and asks for no event loop: callers bring threads.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from r3rag_jax.errors import UserError

RETRIED = (408, 409, 429, 500, 502, 503, 504, 529)  # HTTP status: busy or broken for the moment
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # before the first retry; doubled for each further one
SHOWN = 300  # characters of a reply in an error


class RateLimit:
    """Starts of calls at least 60 / per_minute seconds apart, whichever thread makes them."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._gap_s, self._clock = 60 / per_minute, clock
        self._lock = threading.Lock()
        self._next = clock()

    def reserve(self) -> float:
        """Takes the next free start; returns the seconds until then."""
        with self._lock:
            now = self._clock()
            start = max(now, self._next)
            self._next = start + self._gap_s
            return start - now


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: followed, it would carry the key to another host and lose the request's body."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Endpoint:
    """One such server; its methods may be called from many threads."""

    def __init__(
        self,
        url: str,
        *,
        name: str,
        key_name: str,
        key_env: str = "",
        retries: int,
        timeout_s: float,
        hints: Mapping[int, str] | None = None,
        limit: RateLimit | None = None,
        first_wait_s: float = FIRST_WAIT_S,
        wait: Callable[[float], object] | None = None,
    ):
        """
        Args:
            url: e.g. http://localhost:8000/v1.
            name: the configuration's key of the URL, which errors begin with; `key_name`: that of `key_env`.
            key_env: environment variable that holds the API key; empty: none is sent.
            hints: HTTP status of a refusal -> what may help.
            limit: of all requests, repeated ones included.
            wait: waits so many seconds; tests bring their own. Default: or until the calls are given up.

        Raises:
            UserError: the environment variable is not set.
        """
        self.url, self._name = url.rstrip("/"), name
        self._retries, self._timeout_s, self._first_wait_s, self._limit = retries, timeout_s, first_wait_s, limit
        self._hints = dict.fromkeys((401, 403), f"{key_name} names the variable that holds the key") | dict(hints or {})
        self._key = os.environ.get(key_env, "") if key_env else ""
        if key_env and not self._key:
            raise UserError(f"{key_name} names the environment variable {key_env}: it is not set")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._given_up = threading.Event()
        self._wait = self._given_up.wait if wait is None else wait
        self._is_away = False  # a call has run out of its retries, and none has been answered since
        self._lock = threading.Lock()

    @property
    def first_model(self) -> str:
        """The first model that the server lists."""
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

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """A round of calls; an exception inside ends the retries of those in flight."""
        self._given_up.clear()
        self._is_away = False
        try:
            yield
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Calls in flight are not retried any more."""
        self._given_up.set()

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON reply; retried with exponential backoff while the server is busy, broken or away.

        Once a call has run out of its retries, each further one of the session has a single attempt until one is
        answered: the server has been given its time, and hundreds that wait in turn would take hours to say so.

        Raises:
            UserError: the server refuses, keeps failing, or answers no JSON.
        """
        data = None if body is None else json.dumps(body).encode()
        num_attempts = 1 if self._is_away else self._retries + 1
        error, attempt = "given up before it was asked", 0
        for attempt in range(num_attempts):
            if self._limit is not None and self._pause(self._limit.reserve()):
                break
            least_wait_s = 0.0
            try:
                request = urllib.request.Request(self.url + path, data, self._headers())
                with self._opener.open(request, timeout=self._timeout_s) as response:
                    content = response.read()
                self._is_away = False
                return self._json(path, content)
            except urllib.error.HTTPError as refusal:
                with refusal:
                    error = f"{refusal.code} {self.shown(_content(refusal))}"
                if refusal.code not in RETRIED:
                    self._is_away = False
                    hint = f" ({self._hints[refusal.code]})" if refusal.code in self._hints else ""
                    raise UserError(f"{self._name}: {self.url}{path} answered {error}{hint}") from None
                least_wait_s = _seconds(refusal.headers.get("Retry-After", ""))
            except (OSError, http.client.HTTPException) as away:  # refused, reset, timed out, cut off
                error = str(getattr(away, "reason", "") or away) or type(away).__name__
            if attempt == self._retries:
                self._is_away = True
            wait_s = min(LONGEST_WAIT_S, max(least_wait_s, self._first_wait_s * 2**attempt))
            if attempt == num_attempts - 1 or self._pause(wait_s):
                break
        raise UserError(f"{self._name}: {self.url}{path} failed, attempt {attempt + 1} of {self._retries + 1}: {error}")

    def malformed(self, path: str, rule: str, reply: Any) -> UserError:
        """The error of a reply that breaks a rule."""
        return UserError(f"{self._name}: {self.url}{path} must answer {rule}; got {self.shown(reply)}")

    def shown(self, reply: Any) -> str:
        """A reply cut to a line, without the key that a server may echo."""
        text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else json.dumps(reply)
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"

    def _pause(self, seconds: float) -> bool:
        """Waits; returns whether the calls were given up."""
        self._wait(seconds)
        return self._given_up.is_set()

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        return headers | ({"Authorization": f"Bearer {self._key}"} if self._key else {})

    def _json(self, path: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError:
            raise self.malformed(path, "JSON", content) from None


def _content(refusal: urllib.error.HTTPError) -> bytes:
    try:
        return refusal.read()
    except (OSError, http.client.HTTPException):
        return b""


def _seconds(text: str) -> float:
    """Of a Retry-After header; its other form, a date, counts as none."""
    return float(text) if text.isdecimal() else 0.0

"""Servers that answer alike: requests take turns, and a server that failed is left out for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

FIRST_REST_S, MAX_REST_S = 1.0, 30.0  # a server is left out after a failure; doubled by each further one in a row


class Replicas:
    """The health of some base URLs, as the calls of many threads see it."""

    def __init__(self, urls: Sequence[str], clock: Callable[[], float] = time.monotonic):
        self._urls, self._clock = list(urls), clock
        self._rest_s = dict.fromkeys(urls, 0.0)  # of the last failure; 0 after a reply
        self._rests_until = dict.fromkeys(urls, float("-inf"))
        self._turn = 0
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return ", ".join(self._urls)

    def order(self) -> list[str]:
        """The URLs that the next request tries one after another: those that do not rest, else all."""
        with self._lock:
            turn, self._turn = self._turn, (self._turn + 1) % len(self._urls)
            rotated = self._urls[turn:] + self._urls[:turn]
            now = self._clock()
            return [url for url in rotated if self._rests_until[url] <= now] or rotated

    def failed(self, url: str) -> None:
        """A request to the URL got no answer, or one that asks to come again."""
        with self._lock:
            self._rest_s[url] = min(MAX_REST_S, 2 * self._rest_s[url] or FIRST_REST_S)
            self._rests_until[url] = self._clock() + self._rest_s[url]

    def answered(self, url: str) -> None:
        """A request to the URL got its answer."""
        with self._lock:
            self._rest_s[url], self._rests_until[url] = 0.0, float("-inf")

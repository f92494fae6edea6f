"""Searches of many requests as few searches of the retriever, in one thread."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from r3rag_jax.retrieval.base import Hit, Retriever, search_hits
from r3rag_jax.serving.refusal import busy

Rows = list[list[Hit]]


class BatchObserver(Protocol):
    """Is told of every search of the retriever."""

    def searched(self, num_queries: int, seconds: float) -> None: ...


@dataclasses.dataclass
class _Waiting:
    """A request that waits for its search."""

    queries: Sequence[str]
    k: int
    arrived_s: float
    rows: Future[Rows]


class Batcher:
    """Collects requests for a moment, and searches for all of them at once.

    Queries of one k are searched together and no others, so the hits of a request do not depend on its neighbours even
    where a retriever's depend on k. Where a search fails, each of its requests is searched alone: one request fails no
    other.
    """

    def __init__(
        self,
        open_retriever: Callable[[], Retriever],
        *,
        max_batch: int,
        wait_s: float,
        max_waiting: int,
        observer: BatchObserver | None = None,
    ):
        """
        Args:
            open_retriever: called in the thread that searches, once.
            max_batch: queries of a search; a request with more is searched alone.
            wait_s: how long the first request of a batch waits for others.
            max_waiting: queries that may wait; a request that finds more is refused.
        """
        self._open, self._max_batch, self._wait_s, self._max_waiting = open_retriever, max_batch, wait_s, max_waiting
        self._observer = observer
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._num_waiting = 0  # queries in the queue
        self._changed = threading.Condition()
        self._is_closed = False
        self.opened: Future[Retriever] = Future()
        self._thread = threading.Thread(target=self._run, name="r3rag-search", daemon=True)

    def start(self) -> None:
        """Open the retriever; `opened` has it, or why it could not be opened."""
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Queries that wait for their search."""
        return self._num_waiting

    def search(self, queries: Sequence[str], k: int) -> Future[Rows]:
        """The hits of a request, when its batch has been searched.

        Raises:
            Refusal: too many queries wait, or the batcher is closed.
        """
        waiting = _Waiting(queries, k, time.monotonic(), Future())
        if not queries:
            waiting.rows.set_result([])
            return waiting.rows
        with self._changed:
            if self._is_closed:
                raise busy("the server is shutting down")
            if self._num_waiting and self._num_waiting + len(queries) > self._max_waiting:
                raise busy(f"at most {self._max_waiting} queries may wait; {self._num_waiting} do")
            self._queue.append(waiting)
            self._num_waiting += len(queries)
            self._changed.notify()
        return waiting.rows

    def close(self) -> None:
        """Search no more; requests that wait fail. Does not wait for a search that has begun."""
        with self._changed:
            self._is_closed = True
            for waiting in self._queue:
                waiting.rows.set_exception(busy("the server is shutting down"))
            self._queue.clear()
            self._num_waiting = 0
            self._changed.notify()

    # ---- the thread that searches

    def _run(self) -> None:
        try:
            retriever = self._open()
        except BaseException as error:
            self.opened.set_exception(error)
            return
        self.opened.set_result(retriever)
        while batch := self._next_batch():
            by_k: dict[int, list[_Waiting]] = {}
            for waiting in batch:
                if waiting.rows.set_running_or_notify_cancel():  # else the client has left
                    by_k.setdefault(waiting.k, []).append(waiting)
            for k, group in by_k.items():
                self._search_group(retriever, group, k)

    def _next_batch(self) -> list[_Waiting]:
        """The requests of the next search, at least one; none when the batcher is closed."""
        with self._changed:
            while not self._queue and not self._is_closed:
                self._changed.wait()
            while self._queue and self._num_waiting < self._max_batch:
                left_s = self._queue[0].arrived_s + self._wait_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            batch: list[_Waiting] = []
            size = 0
            while self._queue and (not batch or size + len(self._queue[0].queries) <= self._max_batch):
                batch.append(self._queue.popleft())
                size += len(batch[-1].queries)
            self._num_waiting -= size
            return batch

    def _search_group(self, retriever: Retriever, group: list[_Waiting], k: int) -> None:
        queries = [query for waiting in group for query in waiting.queries]
        started_s = time.monotonic()
        try:
            rows = search_hits(retriever, queries, k)
        except Exception as error:
            if len(group) == 1:
                group[0].rows.set_exception(error)
                return
            for waiting in group:
                self._search_group(retriever, [waiting], k)
            return
        finally:
            if self._observer is not None:
                self._observer.searched(len(queries), time.monotonic() - started_s)
        for waiting in group:
            size = len(waiting.queries)
            waiting.rows.set_result(rows[:size])
            rows = rows[size:]

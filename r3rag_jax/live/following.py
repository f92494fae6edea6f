"""Follows a question for a client: events reach the client's event loop, and a client that leaves stops it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from r3rag_jax.live.rows import LAST_ROWS, PausedRow, Row, RowMaker
from r3rag_jax.rollout.events import Event
from r3rag_jax.rollout.live_scheduler import AskedQuestion

HEARTBEAT_S = 15.0  # a client that is gone without a word is noticed when something is sent to it
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Follower:
    """The events of one question as rows, for one client."""

    def __init__(self, idle_s: float):
        """`idle_s`: how long a question may be paused."""
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def tell(self, event: Event) -> None:
        """For `LiveQuestion.tell`: may be called from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            if not self._loop.is_closed():  # else the server has ended, and nobody listens
                raise

    async def rows(self, asked: AskedQuestion, maker: RowMaker, receive: Receive) -> AsyncIterator[Row | None]:
        """Yield the rows of the question up to its last, and None where nothing has happened for a while.

        The question is cancelled when the client leaves, when it is paused for too long, and when nobody takes rows any
        more.

        Args:
            receive: of the client's request, whose body has been read.
        """
        leaving = asyncio.ensure_future(_left(receive))
        is_paused, since_s = False, time.monotonic()
        getting: asyncio.Future[Event] | None = None
        try:
            while True:
                getting = getting or asyncio.ensure_future(self._events.get())
                both: set[asyncio.Future[Any]] = {getting, leaving}
                await asyncio.wait(both, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
                if leaving.done():
                    return
                if not getting.done():
                    if is_paused and time.monotonic() - since_s > self._idle_s:
                        asked.cancel()  # its last event comes
                    yield None
                    continue
                row, getting = maker.row(getting.result()), None
                is_paused, since_s = isinstance(row, PausedRow), time.monotonic()
                yield row
                if row.event in LAST_ROWS:
                    return
        finally:
            asked.cancel()
            leaving.cancel()
            if getting is not None:
                getting.cancel()


async def _left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass

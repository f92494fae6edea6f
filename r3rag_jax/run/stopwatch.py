"""Where time goes: seconds by name."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator


class Stopwatch:
    """Adds up the seconds of blocks by name. One thread at a time may use it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to `name`, also where it raises."""
        started = self._clock()
        try:
            yield
        finally:
            self.seconds[name] += self._clock() - started


class Eta:
    """Seconds until a loop is done, by its mean pace. The first step compiles programs and is left out of the mean."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._started = clock, clock()
        self._first: tuple[float, int] | None = None  # time and count after the first step

    def after(self, done: int, total: int) -> float:
        """The seconds that remain after a step, of which `done` of `total` are done."""
        now = self._clock()
        if self._first is None:
            self._first = now, done
            return (now - self._started) * (total - done)
        began, count = self._first
        return (now - began) / max(1, done - count) * (total - done)

"""Events of this process that are counted where they happen and reported elsewhere."""

from __future__ import annotations

from collections import Counter
from threading import Lock

_counts: Counter[str] = Counter()
_lock = Lock()


def count_event(name: str) -> None:
    """Count an event. Any thread may call."""
    with _lock:
        _counts[name] += 1


def counted(name: str) -> int:
    """How often an event was counted since the process began."""
    with _lock:
        return _counts[name]

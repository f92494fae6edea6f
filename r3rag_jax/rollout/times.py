"""Where the time of rollouts goes, and how long searches take."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from r3rag_jax.retrieval.base import Hit, Retriever, search_hits
from r3rag_jax.run.stopwatch import Stopwatch


class RolloutTimes:
    """What is measured while trajectories are sampled. Searches may be timed in a thread."""

    def __init__(self) -> None:
        self.watch = Stopwatch()  # prefill, decode, search_wait, score
        self.searches: list[float] = []  # seconds of each batched search that was answered

    def search(self, retriever: Retriever, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """`search_hits`, timed.

        Raises:
            RetrievalError: the search failed.
        """
        started = time.monotonic()
        hits = search_hits(retriever, queries, k)
        self.searches.append(time.monotonic() - started)
        return hits

    @property
    def metrics(self) -> dict[str, float]:
        """Seconds by what they were used for, and the median and 95th percentile of a search."""
        names = ("prefill", "decode", "search_wait", "score")
        seconds = {f"{name}_s": float(self.watch.seconds[name]) for name in names}
        if not self.searches:
            return seconds
        p50, p95 = np.percentile(self.searches, [50, 95])
        return seconds | {"search_p50_s": float(p50), "search_p95_s": float(p95)}

"""Stop conditions of a row besides its token budget."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

MAX_STOPS = 16  # the arrays of stop tokens have this fixed size, so that other tokens need no recompilation

# Maps the sampled ids of a row to the number of ids up to and including the first stop string, or 0.
EndOf = Callable[[Sequence[int]], int]


@dataclasses.dataclass(frozen=True)
class StopTokens:
    """Stop tokens and stop strings of a decode call; a change needs no recompilation."""

    pause_ids: Sequence[int] = ()  # tokens that end a row with NEEDS_RETRIEVAL
    stop_ids: Sequence[int] = ()  # tokens that end a row with DONE
    # Finds stop strings; None: there are none. It runs on the host between device calls. The tokens after a stop string
    # are dropped, and the row is DONE.
    end_of: EndOf | None = None

    def __post_init__(self) -> None:
        if (num_ids := len(self.pause_ids) + len(self.stop_ids)) > MAX_STOPS:
            raise ValueError(f"there must be at most {MAX_STOPS} stop tokens; got {num_ids}")

    @functools.cached_property
    def all_ids(self) -> np.ndarray:
        """int32 [MAX_STOPS], all tokens that end a row, padded with -1."""
        return _padded([*self.pause_ids, *self.stop_ids])

    @functools.cached_property
    def padded_pause_ids(self) -> np.ndarray:
        """int32 [MAX_STOPS], `pause_ids` padded with -1."""
        return _padded(self.pause_ids)


NO_STOPS = StopTokens()


def _padded(ids: Sequence[int]) -> np.ndarray:
    padded = np.full(MAX_STOPS, -1, np.int32)
    padded[: len(ids)] = ids
    return padded

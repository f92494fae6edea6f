"""What ends the decoding of a row before its budget does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

MAX_STOPS = 16  # stop tokens of a decode call; a fixed number, so that other tokens need no other program

EndOf = Callable[[Sequence[int]], int]


@dataclasses.dataclass(frozen=True)
class StopTokens:
    """What ends the rows of a decode call. Another one needs no new compilation."""

    pause_ids: Sequence[int] = ()  # tokens that end a row with NEEDS_RETRIEVAL
    stop_ids: Sequence[int] = ()  # tokens that end a row with DONE
    # Of the ids that a row has sampled, the number up to and including the first stop string, or 0. It is called
    # between calls on the device; what a row has sampled after the string is dropped, and the row is DONE.
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

"""Decode windows: the numbers of rows and positions a decode call is compiled for. A smaller window is faster."""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import Mesh

from r3rag_jax.parallel.shardings import batch_ways
from r3rag_jax.sampler.cache.base import padded
from r3rag_jax.sampler.cache.kv_cache import KVCache

POSITION_SHARES = (8, 4, 2, 1)  # windows cover 1/8, 1/4, 1/2 or all of the positions ...
ROW_SHARES = (4, 2)  # ... and 1/4, 1/2 or all of the rows
MIN_POSITIONS = 64  # smallest window


class Window(NamedTuple):
    """Number of cache rows and of leading positions that a decode call reads and writes."""

    rows: int
    positions: int


def windows(cache: KVCache, mesh: Mesh, max_length: int) -> list[Window]:
    """The windows to compile decode calls for, cheapest first; the last one is the whole cache.

    Windows with all rows have any share of the positions. Windows with fewer rows have many positions: they serve the
    last, long rows of a rollout. For a cache that is read in place, every window has all positions, and there is one
    with three quarters of the rows, for the time in which the other rows wait for a search. If rows are split over
    devices, every window has all rows, because a subset would have to move between devices.
    """
    slots, is_in_place = cache.num_rows, cache.is_read_in_place
    shares = (1,) if is_in_place else POSITION_SHARES
    sizes = {padded(-(-max_length // share)) for share in shares}
    positions = sorted(size for size in sizes if size >= min(MIN_POSITIONS, padded(max_length)))
    few = {slots // share for share in ROW_SHARES} | ({slots * 3 // 4} if is_in_place else set())
    few = few - {0, slots} if batch_ways(mesh, slots) == 1 else set()
    found = [Window(slots, size) for size in positions] + [
        Window(rows, size) for rows in few for size in positions[-2:]
    ]
    return sorted(found, key=lambda window: window.rows * (window.positions + MIN_POSITIONS))

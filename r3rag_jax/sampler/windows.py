"""Which part of the cache a decode call works on: a step takes time by the rows and positions that it can see."""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import Mesh

from r3rag_jax.parallel.shardings import batch_ways
from r3rag_jax.sampler.cache.base import padded
from r3rag_jax.sampler.cache.kv_cache import KVCache

POSITION_SHARES = (8, 4, 2, 1)  # a window holds one over this of the positions ...
ROW_SHARES = (4, 2)  # ... and of the rows, where it does not hold all
MIN_POSITIONS = 64


class Window(NamedTuple):
    """The size of a decode call."""

    rows: int
    positions: int


def windows(cache: KVCache, mesh: Mesh, max_length: int) -> list[Window]:
    """The windows that decode calls are compiled for, cheapest first; the last one is the whole cache.

    They hold all rows with as many positions as the longest row needs, or fewer rows with many positions: the rows left
    at the end of a rollout. A cache that is read in place always offers all positions, and also three quarters of the
    rows, for when the others wait for a search. Where rows are split over devices a window holds all rows: fewer would
    have to move between devices.
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

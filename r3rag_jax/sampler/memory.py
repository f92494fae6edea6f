"""What a phase keeps on each device, counted before anything is allocated.

Counted is what lives as long as the phase: parameters, optimizer, reference, the sampler's cache. What a step needs for
itself (gradients, activations, logits) comes on top and is the compiler's to say.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from r3rag_jax.errors import UserError
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.parallel.shardings import batch_ways
from r3rag_jax.sampler.cache.base import padded
from r3rag_jax.sampler.cache.kv_cache import KVCache
from r3rag_jax.sampler.ops import SamplerOps
from r3rag_jax.sampler.windows import windows

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device."""

    parts: dict[str, int]  # what there is beside the cache
    slots: int  # rows of the sampler over all devices; 0 = no sampler
    ways: int  # devices that rows are split over
    slot: int  # keys and values of one row, and the part of them that a decode call works on
    limit: int | None  # what the device has; None = it does not say

    @property
    def cache(self) -> int:
        """Of the rows that a device holds."""
        return self.slot * self.slots // self.ways

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + self.cache

    def check(self) -> None:
        """Raises UserError where the plan is larger than the device, naming the most slots that fit."""
        if self.limit is None or self.total <= self.limit:
            return
        fit = (self.limit - sum(self.parts.values())) // self.slot * self.ways if self.slots else 0
        raise UserError(
            f"rollout.slots must be at most {fit} for {self.limit / GIB:.2f} GiB of memory; got {self.slots} ({self})"
            if fit > 0
            else f"what is trained must fit into {self.limit / GIB:.2f} GiB of memory per device; got {self}"
        )

    def __str__(self) -> str:
        parts = [f"{name} {size / GIB:.2f}" for name, size in self.parts.items()]
        if self.slots:
            parts.append(f"cache of {self.slots} slots {self.cache / GIB:.2f}")
        of = "" if self.limit is None else f" of {self.limit / GIB:.2f}"
        return f"{' + '.join(parts)} = {self.total / GIB:.2f}{of} GiB per device"


def plan(
    mesh: Mesh,
    parts: dict[str, int],
    decoder: DecoderConfig | None = None,
    *,
    slots: int = 0,
    max_length: int = 0,
    dtype: Any = None,
) -> MemoryPlan:
    """The plan of a phase: `parts` as `bytes_per_device` counts them, and the cache of such an `Engine`."""
    slot, ways = 0, batch_ways(mesh, slots)
    if decoder is not None:
        cache_of = functools.partial(KVCache.init, decoder, dtype=dtype, ops=SamplerOps.of(mesh))
        whole = jax.eval_shape(functools.partial(cache_of, slots, padded(max_length)))
        taken = [] if whole.is_read_in_place else windows(whole, mesh, max_length)[:-1]
        copied = max((window.rows * window.positions for window in taken), default=0)
        positions = padded(max_length) + -(-copied // slots)
        one = jax.eval_shape(functools.partial(cache_of, 1, positions))
        slot = bytes_per_device(one, one.shardings(mesh))
    return MemoryPlan(parts, slots if decoder is not None else 0, ways, slot, device_memory(mesh))


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Of the largest share that a device gets; `tree` holds shapes and types, or arrays."""
    leaves, places = jax.tree.leaves(tree), jax.tree.leaves(shardings)
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(leaves, places, strict=True)
    )


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that a device of this process has; on the host's CPU what is available now, shared by the devices."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        available = _available()
        return None if available is None else available // len(mesh.local_devices)
    return (device.memory_stats() or {}).get("bytes_limit")


def _available() -> int | None:
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:  # all there is, where the system does not tell what is left
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None

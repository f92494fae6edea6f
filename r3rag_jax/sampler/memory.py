"""Estimates the memory of a phase per device before anything is allocated.

The arrays that live as long as the phase are counted: parameters, optimizer state, reference policy, sampler weights,
KV cache. The temporaries of its programs (gradients, activations, logits) are estimated, since their size depends on
the compiler; `python -m r3rag_jax.compile` has the compiler's own numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
    """Estimated memory of one device, in bytes."""

    array_bytes: dict[str, int]  # bytes of everything except the KV cache, by name
    num_slots: int  # number of sampler rows over all devices; 0 = no sampler
    num_shards: int  # number of devices that the rows are split over
    slot_bytes: int  # cache bytes per row, including its share of the copy that a decode call makes
    device_bytes: int | None  # memory of the device; None = unknown
    temporaries: dict[str, int] = dataclasses.field(default_factory=dict)  # estimated bytes by program

    @property
    def cache_bytes(self) -> int:
        """KV-cache bytes of the rows on one device."""
        return self.slot_bytes * self.num_slots // self.num_shards

    @property
    def total_bytes(self) -> int:
        """Bytes of the arrays, without temporaries."""
        return sum(self.array_bytes.values()) + self.cache_bytes

    @property
    def peak_bytes(self) -> int:
        """Estimated bytes while the program with the most temporaries runs."""
        return self.total_bytes + max(self.temporaries.values(), default=0)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name: arrays, the cache, and the largest temporaries."""
        cache = {"cache": self.cache_bytes} if self.num_slots else {}
        return {**self.array_bytes, **cache, "temporaries": self.peak_bytes - self.total_bytes}

    @property
    def is_tight(self) -> bool:
        """Whether the arrays fit the device, but by the estimate not with the temporaries."""
        return self.device_bytes is not None and self.total_bytes <= self.device_bytes < self.peak_bytes

    def check(self) -> None:
        """Check that the arrays of the plan fit the device; temporaries, which are estimated, refuse nothing.

        Raises:
            UserError: it does not; the message gives the largest number of slots that fits.
        """
        if self.device_bytes is None or self.total_bytes <= self.device_bytes:
            return
        free = self.device_bytes - sum(self.array_bytes.values())
        fit = free // self.slot_bytes * self.num_shards if self.num_slots else 0
        limit = f"{self.device_bytes / GIB:.2f}"
        raise UserError(
            f"rollout.slots must be at most {fit} for {limit} GiB of memory; got {self.num_slots} ({self})"
            if fit > 0
            else f"what is trained must fit into {limit} GiB of memory per device; got {self}"
        )

    def __str__(self) -> str:
        terms = [f"{name} {size / GIB:.2f}" for name, size in self.array_bytes.items()]
        if self.num_slots:
            terms.append(f"cache of {self.num_slots} slots {self.cache_bytes / GIB:.2f}")
        limit = "" if self.device_bytes is None else f" of {self.device_bytes / GIB:.2f}"
        peak = f", with temporaries about {self.peak_bytes / GIB:.2f}" if self.temporaries else ""
        return f"{' + '.join(terms)} = {self.total_bytes / GIB:.2f}{limit} GiB per device{peak}"


def plan(
    mesh: Mesh,
    array_bytes: dict[str, int],
    decoder: DecoderConfig | None = None,
    *,
    slots: int = 0,
    max_length: int = 0,
    dtype: Any = None,
    temporaries: dict[str, int] | None = None,
    device_bytes: int | None = None,
) -> MemoryPlan:
    """Estimate the memory of a phase.

    Args:
        array_bytes: name -> bytes per device, see `bytes_per_device`.
        decoder: model of the phase's `Engine`; None: the phase has no sampler.
        slots, max_length, dtype: of that `Engine`.
        temporaries: program -> estimated bytes per device.
        device_bytes: memory of a device; None: what the devices of `mesh` say.
    """
    num_shards = batch_ways(mesh, slots)
    slot_bytes = 0 if decoder is None else _slot_bytes(mesh, decoder, slots, max_length, jnp.dtype(dtype))
    num_slots = slots if decoder is not None else 0
    limit = device_memory(mesh) if device_bytes is None else device_bytes
    return MemoryPlan(array_bytes, num_slots, num_shards, slot_bytes, limit, temporaries or {})


@functools.lru_cache(maxsize=64)
def _slot_bytes(mesh: Mesh, decoder: DecoderConfig, slots: int, max_length: int, dtype: jnp.dtype) -> int:
    """See `MemoryPlan.slot_bytes`."""
    cache_of = functools.partial(KVCache.init, decoder, dtype=dtype, ops=SamplerOps.of(mesh))
    cache = jax.eval_shape(functools.partial(cache_of, slots, padded(max_length)))
    # A decode call copies its window of the cache, unless it is read in place or the window is all of it.
    copied_windows = [] if cache.is_read_in_place else windows(cache, mesh, max_length)[:-1]
    copied = max((window.rows * window.positions for window in copied_windows), default=0)
    positions = padded(max_length) + -(-copied // slots)
    one_row = jax.eval_shape(functools.partial(cache_of, 1, positions))
    return bytes_per_device(one_row, one_row.shardings(mesh))


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes of a pytree on one device under a pytree of shardings; leaves are arrays or `jax.ShapeDtypeStruct`s."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


def device_memory(mesh: Mesh) -> int | None:
    """Memory of one device of this process in bytes; None if unknown. CPU devices share the host's available memory."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        available = _available()
        return None if available is None else available // len(mesh.local_devices)
    return (device.memory_stats() or {}).get("bytes_limit")


def _available() -> int | None:
    """Available memory of the host in bytes; None if the system does not report it."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:  # total memory where MemAvailable is not reported
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None

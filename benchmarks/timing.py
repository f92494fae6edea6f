"""Timing for the benchmarks, and the peak speed and memory bandwidth of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def medians(
    variants: dict[str, Callable[[], Any]], rounds: int, warm_up: bool = False, is_compiled: bool = False
) -> dict[str, float]:
    """Median seconds of each variant. Each round calls all variants in turn.

    Args:
        rounds: number of measured rounds.
        warm_up: whether each measured call follows an unmeasured one, which maps again the memory that the process
            returned to the system while other variants ran. A process that runs one variant has no such cost.
        is_compiled: whether the variants are already compiled; otherwise, an unmeasured round comes first.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(1 if is_compiled else 0, rounds + 1):
        for name, variant in variants.items():
            if warm_up and number > 0:
                variant()
            start = time.perf_counter()
            variant()
            if number > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def matmul_flops(dtype: str) -> float:
    """FLOP/s of a compute-bound matmul; a multiply-add counts as two operations."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x, y = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in range(2))
    multiply = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    return 2 * size**3 / _best(lambda: multiply(x, y).block_until_ready())


def read_bandwidth() -> float:
    """Bytes per second when summing an array larger than the caches."""
    array = jnp.ones(2**28, jnp.float32)
    total = jax.jit(jnp.sum)
    return array.nbytes / _best(lambda: total(array).block_until_ready())


def _best(call: Callable[[], Any], rounds: int = 10) -> float:
    """Seconds of the fastest of `rounds` calls, after an unmeasured one that compiles."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def torch_device() -> str:
    """The device for PyTorch: a GPU if JAX uses one, otherwise the CPU."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"

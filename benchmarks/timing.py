"""How the benchmarks take times, and what a machine can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def medians(
    ways: dict[str, Callable[[], Any]], rounds: int, settle: bool = False, is_compiled: bool = False
) -> dict[str, float]:
    """Seconds of each way; the first call of each, which compiles, is not counted, unless `is_compiled`.

    With `settle` every turn begins with a call that is not counted: it maps again the gigabytes of memory that the
    other ways' turns gave back, which nobody who runs one way alone pays for.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 if is_compiled else 0, rounds + 1):
        for name, way in ways.items():
            if settle and number > 0:
                way()
            start = time.perf_counter()
            way()
            if number > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def matmul_flops(dtype: str) -> float:
    """Multiply-adds, counted as two, a second, of a matmul large enough to be bound by them."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x, y = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in range(2))
    multiply = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    return 2 * size**3 / _best(lambda: multiply(x, y).block_until_ready())


def read_bandwidth() -> float:
    """Bytes a second of summing an array that no cache holds."""
    array = jnp.ones(2**28, jnp.float32)
    total = jax.jit(jnp.sum)
    return array.nbytes / _best(lambda: total(array).block_until_ready())


def _best(way: Callable[[], Any], rounds: int = 10) -> float:
    way()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        way()
        times.append(time.perf_counter() - start)
    return min(times)


def torch_device() -> str:
    """Where PyTorch runs beside us: on the same kind of device."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"

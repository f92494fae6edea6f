"""A profile of one RL iteration, written by JAX's profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax


@contextlib.contextmanager
def profiled(directory: Path, is_wanted: bool) -> Iterator[None]:
    """Profile the block into `directory`, where that is wanted; every process writes its own file there."""
    if not is_wanted:
        yield
        return
    with jax.profiler.trace(str(directory)):
        yield

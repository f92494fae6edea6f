"""The user's cache directory, and JAX's persistent compile cache in it."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def use_compile_cache() -> None:
    """Turn on JAX's persistent compile cache, in $JAX_COMPILATION_CACHE_DIR or else in the user's cache directory."""
    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache_directory("xla")))
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def cache_directory(name: str) -> Path:
    """This package's directory `name` for reproducible files, under $XDG_CACHE_HOME or else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "r3rag_jax" / name

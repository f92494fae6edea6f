"""Test session: eight forced CPU devices, and a compile cache of its own that makes reruns fast."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

TESTS = Path(__file__).resolve().parent
DEVICES = "--xla_force_host_platform_device_count"

# Before jax is imported anywhere: `pytest -m gpu` names its own platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # helpers such as tiny.py; the package, installed or not

hypothesis.settings.register_profile("no_clock", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("no_clock")


def pytest_configure(config: pytest.Config) -> None:
    """The user's compile cache is neither read nor written; ours also keeps the many short compilations."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")  # two writers of one entry could meet
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir(f"xla-{worker}"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

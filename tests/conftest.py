"""Test session: eight forced CPU devices, and a compile cache of its own that makes reruns fast."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

TESTS = Path(__file__).resolve().parent
DEVICES = "--xla_force_host_platform_device_count"
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds"  # 40 by default, then XLA aborts the process

# Before jax is imported anywhere: `pytest -m gpu` names its own platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for flag, value in ((DEVICES, 8), (PATIENCE, 600)):
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # tiny programs: compiling is what takes the time
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # no operation needs to know where it was traced
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # helpers such as tiny.py; the package, installed or not
sys.path += [str(folder) for folder in TESTS.iterdir() if folder.is_dir()]  # tests that share what they build

from browser import chromium, open_page  # noqa: E402, F401  # fixtures

hypothesis.settings.register_profile("no_clock", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("no_clock")


def pytest_configure(config: pytest.Config) -> None:
    """With `-m tpu` one CPU device: programs for a pod must not take a form that the CPUs of this process need.

    The user's compile cache is neither read nor written; ours keeps what takes longer to compile than to write.
    """
    if config.option.markexpr == "tpu":  # jax is not imported yet
        os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(f"{DEVICES}=8", f"{DEVICES}=1")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")  # two writers of one entry could meet
    if not hasattr(config, "cache"):  # pytest -p no:cacheprovider
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir(f"xla-{worker}"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


def pytest_collection_finish() -> None:
    """Collect garbage less often: traced programs are millions of objects that live on, a tenth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers a file stays together, as do all tests that read a finished run: nothing is made twice.

    In the workers alone this has an effect; they collect as their parent does, and start none of their own.
    """
    for item in items:
        group = "finished" if "finished" in getattr(item, "fixturenames", ()) else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tiny random policy."""
    import tiny_run

    return tiny_run.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Protocol -> directory of a finished tiny run; each is trained once. Tests only read it: who adds takes a copy."""
    from tiny_run import train

    @functools.cache
    def run_dir(protocol: str) -> Path:
        directory = tmp_path_factory.mktemp(f"finished-{protocol}")
        train(directory, base, protocol)
        return directory / "run"

    return run_dir


@pytest.fixture
def pod(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The devices of a v5e 4x4 slice, to compile for; with the optimizations that the other tests do without.

    On a process with one CPU device, see `pytest_configure`.
    """
    pytest.importorskip("libtpu", reason="needs the TPU compiler: the package libtpu, of the version jax[tpu] names")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    import jax
    from jax.experimental import topologies

    assert jax.local_device_count() == 1, "run these tests with -m tpu alone"
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    before = {
        "jax_disable_most_optimizations": jax.config.read("jax_disable_most_optimizations"),
        "jax_enable_compilation_cache": jax.config.jax_enable_compilation_cache,
    }
    for name in before:  # what was compiled for devices that are not there cannot be read from a cache
        jax.config.update(name, False)
    yield devices
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def own_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines share no programs: for a test that changes what these are traced from."""
    from r3rag_jax.sampler import engine, programs

    monkeypatch.setattr(engine, "shared_programs", programs.SamplerPrograms)

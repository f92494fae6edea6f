"""Each script of `benchmarks/` at a small size: it runs, and prints its table. Their figures are in docs/benchmarks.md.

`soak.py` and `compare_commits.py` have tests of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import r3rag_jax

PACKAGE = Path(r3rag_jax.__file__).parent
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.slow

# The words of a command, the packages that it needs, and what it prints; RUN is a small quickstart.
CASES = {
    "attention": ("attention.py --rows 1 --length 256 --heads 4 --kv-heads 2 --head-dim 16", (), "four branches"),
    "trees": ("training.py trees bundled --trajectories 2 --row-length 2048 --rounds 1", (), "and an answer"),
    "arrays": ("training.py arrays --rounds 1", ("torch",), "GAE"),
    "sft": (
        "training.py sft bundled --rows 1 --length 64 --rounds 1 --dtypes float32", ("torch", "transformers"), "PyTorch"
    ),
    "ppo": (
        "training.py ppo bundled --rows 1 --length 64 --rounds 1 --dtypes float32", ("torch", "transformers"), "PyTorch"
    ),
    "steps": ("rollouts.py steps BASE --dtypes float32 --batch 2 --rounds 1", (), "cache"),
    "run": (
        "rollouts.py run RUN --questions 8 --slots 4 --singles 1 --turns 0 1 --latencies 5 --rounds 1", (), "lockstep"
    ),
    "process_rewards": (
        "process_rewards.py --config RUN/config.yaml run_dir=RUN --iterations 1", (), "gain"
    ),
    "generation": (
        "generation.py BASE --batches 1 --prompt 16 --new 8 --rounds 1 --dtypes float32", ("torch",), "transformers"
    ),
    "import_memory": ("import_memory.py --gigabytes 0.05 --devices 2", (), "overhead"),
    "index_scale": ("index_scale.py --passages 20000 --dim 32 --kind flat --work WORK", (), "recall"),
    "serve": ("serve.py INDEX --clients 2 --seconds 3", (), "errors"),
}  # fmt: skip


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
    "PYTHONPATH": str(BENCHMARKS.parent), "JAX_PLATFORMS": "cpu"
}  # fmt: skip


def printed(words: list[str], directory: Path) -> str:
    """What a command prints, on one device."""
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=ENVIRONMENT, cwd=directory, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickstart of a few steps, with its index and the policy of its cold start."""
    directory = tmp_path_factory.mktemp("runs")
    recipe = BENCHMARKS.parent / "configs" / "quickstart.yaml"
    keys = "world.num_people=100 world.num_sft=16 sft.epochs=4 rl.questions=4 rollout.samples=2 phases=index,sft"
    printed(["-m", "r3rag_jax.train", "--config", str(recipe), *keys.split()], directory)
    return directory / "runs" / "quickstart"


@pytest.mark.parametrize("name", CASES)
def test_it_runs(name: str, run: Path, tmp_path: Path) -> None:
    command, needed, said = CASES[name]
    for package in needed:
        pytest.importorskip(package, reason=f"compares with {package}")
    places = {"RUN": run, "INDEX": run / "index", "WORK": tmp_path / "work", "BASE": PACKAGE / "world" / "base"}
    for word, path in places.items():
        command = command.replace(word, str(path))
    script, *rest = command.split()
    assert said in printed([str(BENCHMARKS / script), *rest], tmp_path)

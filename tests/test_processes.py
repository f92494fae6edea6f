"""Two processes train together the run that one process trains alone.

Two devices each, and the parameters cut into four: every step needs the other process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file

from r3rag_jax import train

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(recipe: Path, port: int, rank: int) -> subprocess.Popen[str]:
    mesh = {
        "fsdp": 4,
        "distributed": "true",
        "coordinator": f"127.0.0.1:{port}",
        "num_processes": 2,
        "process_id": rank,
    }
    overrides = ["eval.systems=r3rag", *(f"mesh.{name}={value}" for name, value in mesh.items())]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(Path(train.__file__).parent.parent),
    }
    command = [sys.executable, "-m", "r3rag_jax.train", "--config", str(recipe), *overrides]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=recipe.parent
    )


def test_two_processes_train_the_same_run(finished: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    recipe, port = tiny_run.write_recipe(tmp_path, base), free_port()
    processes = [start(recipe, port, rank) for rank in range(2)]
    try:
        said = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert "Report" in said[0]
    assert "Report" not in said[1]  # one process speaks, writes and exports

    one, two = finished("tags"), tmp_path / "run"
    written = {
        name for name in tiny_run.files(one) if name.split("/")[0] not in ("checkpoints", "eval", "trajectories")
    }
    assert tiny_run.files(two).keys() >= written
    for want, got in zip(tiny_run.metrics(one), tiny_run.metrics(two), strict=True):
        assert want.keys() == got.keys()
        for name in want.keys() - {"phase"}:
            # Adam makes whole steps of gradients that are rounding: it shows from the second RL iteration on.
            rel = 1e-2 if want["phase"] == "rl" and want["step"] > 0 else 1e-3
            rel = 0.1 if name == "explained_variance" else rel  # a ratio of variances that are nearly nothing
            # On the first pass over a batch the policy loss is a sum of terms of size one that cancel to nothing.
            least = 1e-4 if name == "policy_loss" else 1e-5
            assert got[name] == pytest.approx(want[name], rel=rel, abs=least), (want["phase"], want["step"], name)
    for phase in ("sft", "rl"):
        want, got = (load_file(run / "policy" / phase / "model.safetensors") for run in (one, two))
        difference = np.concatenate([np.abs(got[name] - want[name]).ravel() for name in want])
        # Adam divides by a gradient's size; where that is rounding, another order of summation shows.
        assert np.mean(difference > 1e-5) < 1e-3
        assert difference.max() < 2e-3
    for name in ("data/sft.jsonl", "trajectories/rl.jsonl", "trajectories/r3rag.jsonl"):
        assert tiny_run.files(two)[name] == tiny_run.files(one)[name]  # the sampled words, too

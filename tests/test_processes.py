"""Two processes train together the run that one process trains alone.

Two devices each, and the parameters cut into four: every step needs the other process. The one process has the
same mesh of four, and begins RL from the cold start of the two (which it was found to equal), as one rounding of a
weight may choose another word.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
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


def start(recipe: Path, num_devices: int, *overrides: str) -> subprocess.Popen[str]:
    """A training process with `num_devices` devices of its own, the parameters cut into four."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        "PYTHONPATH": str(Path(train.__file__).parent.parent),
    }
    command = [sys.executable, "-m", "r3rag_jax.train", "--config", str(recipe), "mesh.fsdp=4"]
    command += ["eval.systems=r3rag", *overrides]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=recipe.parent
    )


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What the processes said; all must have ended well."""
    try:
        said = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


def test_two_processes_train_the_same_run(base: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    recipe = tiny_run.write_recipe(two, base)
    pair = ["mesh.distributed=true", "mesh.num_processes=2", f"mesh.coordinator=127.0.0.1:{free_port()}"]
    said = finish([start(recipe, 2, *pair, f"mesh.process_id={rank}") for rank in range(2)])
    assert "Report" in said[0]
    assert "Report" not in said[1]  # one process speaks, writes and exports
    recipe, one, two = tiny_run.write_recipe(one, base), one / "run", two / "run"
    finish([start(recipe, 4, "phases=[index,sft]")])
    assert_same_policy(one, two, "sft")
    shutil.copytree(two / "policy" / "sft", one / "policy" / "sft", dirs_exist_ok=True)
    finish([start(recipe, 4)])
    assert_same_policy(one, two, "rl")
    assert tiny_run.files(two).keys() >= {name for name in tiny_run.files(one) if not name.startswith("checkpoints")}
    for want, got in zip(tiny_run.metrics(one), tiny_run.metrics(two), strict=True):
        assert want.keys() == got.keys()
        if "sampler_gap" in want:  # itself the largest rounding of the iteration
            assert max(want["sampler_gap"], got["sampler_gap"]) < 1e-4
        for name in want.keys() - {"phase", "sampler_gap"}:
            assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), (want["phase"], want["step"], name)
    for name in ("data/sft.jsonl", "trajectories/rl.jsonl", "trajectories/r3rag.jsonl"):
        assert tiny_run.files(two)[name] == tiny_run.files(one)[name]  # the sampled words, too


def assert_same_policy(one: Path, two: Path, phase: str) -> None:
    want, got = (load_file(run / "policy" / phase / "model.safetensors") for run in (one, two))
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5, err_msg=f"{phase} {name}")

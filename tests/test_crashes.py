"""The crash matrix: a tiny run that is killed anywhere, and started again, ends as one that never was."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny_run
from crashing import POINTS
from two_processes import spawn

from r3rag_jax.run.files import is_partial

TESTS = Path(__file__).parent
SETTINGS: dict[str, Any] = {
    "sft__epochs": 16, "sft__lr": 1e-3, "sft__checkpoint_every": 2, "sft__keep_checkpoints": 1,
    "rl__iterations": 3, "rl__checkpoint_every": 1, "rl__keep_checkpoints": 1, "rl__eval_every": 2,
    "eval__systems": "[r3rag]",
}  # fmt: skip
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo-lora": ("tags", {"lora__rank": 4}),
    "async": ("tags", {"rl__async_rollouts": "true", "rl__checkpoint_every": 2, "rl__entropy_coef": 0.1}),
    "steps": ("steps", {}),
}
NUM_RANDOM, SEED = 20, 29
LIMIT_S = 600.0

pytestmark = [pytest.mark.slow, pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A configuration, and its run that nobody killed."""

    name: str
    base: Path
    whole: Path  # directory of that run's recipe
    run_s: float  # it took so long
    cache: Path  # of compiled programs

    def start(self, directory: Path, point: str = "", said: Path | None = None) -> subprocess.Popen[str]:
        """The command in a process of its own, with one device, which dies at a point; `said` gets what it prints."""
        protocol, settings = CONFIGURATIONS[self.name]
        recipe = tiny_run.write_recipe(directory, self.base, protocol, **SETTINGS | settings)
        command = [str(TESTS / "crashing.py"), point, "--config", str(recipe)]
        return spawn(command, 1, directory, said or directory / "said.txt", JAX_COMPILATION_CACHE_DIR=str(self.cache))

    def run(self, directory: Path, point: str = "", said: Path | None = None) -> int:
        """As `start`; returns the exit status."""
        return self.start(directory, point, said).wait(LIMIT_S)

    def check(self, directory: Path) -> None:
        """Compare what a run has left with the run that nobody killed."""
        whole, run = self.whole / "run", directory / "run"
        assert tiny_run.metrics(run) == tiny_run.metrics(whole)
        one, other = tiny_run.files(whole), tiny_run.files(run)
        same = [name for name in one if name.split("/")[0] in ("data", "policy", "trajectories", "eval")]
        assert len(same) > 20
        assert [name for name in same if other.get(name) != one[name]] == []
        assert [path for path in run.rglob(".*") if is_partial(path)] == []
        assert list(run.glob("checkpoints/*/*orbax-checkpoint-tmp*")) == []


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def matrix(
    request: pytest.FixtureRequest, finished: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Matrix:
    """From the cold start of another run, so that rollouts search."""
    name, whole = request.param, tmp_path_factory.mktemp(f"whole-{request.param}")
    base, cache = finished(CONFIGURATIONS[name][0]) / "policy" / "sft", tmp_path_factory.mktemp("xla")
    assert Matrix(name, base, whole, 0.0, cache).run(whole / "compiled") == 0  # compiles, and is thrown away
    started = time.monotonic()
    assert Matrix(name, base, whole, 0.0, cache).run(whole) == 0, (whole / "said.txt").read_text()
    rl = [row for row in tiny_run.metrics(whole / "run") if row["phase"] == "rl"]
    assert max(row["mean_retrievals"] for row in rl) > 0.2
    return Matrix(name, base, whole, time.monotonic() - started, cache)


def test_killed_at_every_point(matrix: Matrix, tmp_path: Path) -> None:
    """One run, killed at each point in turn: each process goes on from what the one before has left."""
    started = time.monotonic()
    for point in POINTS:
        assert matrix.run(tmp_path, point) == -signal.SIGKILL, (point, (tmp_path / "said.txt").read_text())
    assert matrix.run(tmp_path) == 0, (tmp_path / "said.txt").read_text()
    matrix.check(tmp_path)
    print(f"\n{matrix.name}: killed at {len(POINTS)} points, {time.monotonic() - started:.0f} s")


def test_killed_at_random_times(matrix: Matrix, tmp_path: Path) -> None:
    """Runs that are killed until there were NUM_RANDOM kills; one that ends meanwhile is compared, and begun anew."""
    rng, started, number, killed = random.Random(f"{SEED} {matrix.name}"), time.monotonic(), 0, 0
    while killed < NUM_RANDOM:
        directory = tmp_path / str(number)
        process = matrix.start(directory)
        try:
            status = process.wait(rng.uniform(0.1, 1.0) * matrix.run_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            continue
        assert status == 0, (directory / "said.txt").read_text()
        matrix.check(directory)
        number += 1
    assert matrix.run(directory) == 0, (directory / "said.txt").read_text()
    matrix.check(directory)
    print(f"\n{matrix.name}: killed at {killed} random times, {number + 1} runs, {time.monotonic() - started:.0f} s")


MAKE_ROOM = "make room and start the same command again"


def finished_files(run: Path) -> dict[str, bytes]:
    """What a run has whole: data, index, policies, results."""
    kept = ("data/", "index/", "policy/", "eval/")
    return {name: content for name, content in tiny_run.files(run).items() if name.startswith(kept)}


@pytest.mark.parametrize("matrix", ["ppo-lora"], indirect=True)
def test_a_full_disk_at_every_write(matrix: Matrix, tmp_path: Path) -> None:
    """Each process fails at a place where none before has failed: nothing that was there is lost, and the run ends."""
    seen, statuses, before = tmp_path / "seen.txt", [], dict[str, bytes]()
    while (status := matrix.run(tmp_path, f"full:{seen}")) != 0:
        said = (tmp_path / "said.txt").read_text()
        assert status == 2 and MAKE_ROOM in said, said
        after = finished_files(tmp_path / "run")
        assert {name for name in before if name in after} == before.keys(), seen.read_text()
        before = after
        statuses.append(status)
    matrix.check(tmp_path)
    places = seen.read_text().splitlines()
    assert len(places) == len(statuses) > 20
    print(f"\nfull disk at {len(places)} places: {', '.join(places)}")


@pytest.mark.parametrize("matrix", ["ppo-lora"], indirect=True)
def test_a_disk_that_is_too_small(matrix: Matrix, tmp_path: Path) -> None:
    """A real one, which grows each time the run has ended: wherever it was full, the same command goes on."""
    directory, size, statuses = tmp_path / "disk", 64 << 10, []
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        before = dict[str, bytes]()
        while (status := matrix.run(directory, said=tmp_path / "said.txt")) != 0:
            said = (tmp_path / "said.txt").read_text()
            assert status == 2 and MAKE_ROOM in said, said
            after = finished_files(directory / "run")
            assert {name for name in before if name in after} == before.keys()
            before, size = after, int(size * 1.25)
            statuses.append(status)
            subprocess.run(["mount", "-o", f"remount,size={size}", str(directory)], check=True)
        matrix.check(directory)
    finally:
        subprocess.run(["umount", str(directory)], check=True)
    assert len(statuses) > 5
    print(f"\na disk of {64 << 10} to {size} bytes was full {len(statuses)} times")


@pytest.mark.parametrize("matrix", ["ppo-lora"], indirect=True)
def test_sigterm_at_random_times(matrix: Matrix, tmp_path: Path) -> None:
    """Twenty times the run saves and ends; the newest checkpoint is of the last step that is logged."""
    rng, number, took = random.Random(f"{SEED} SIGTERM"), 0, []
    while len(took) < NUM_RANDOM:
        directory = tmp_path / str(number)
        process = matrix.start(directory)
        try:
            status = process.wait(rng.uniform(0.2, 1.0) * matrix.run_s)
            number += 1
        except subprocess.TimeoutExpired:
            sent = time.monotonic()
            process.send_signal(signal.SIGTERM)
            status = process.wait(LIMIT_S)
            took.append(time.monotonic() - sent)
            said = (directory / "said.txt").read_text()
            if "stopped: SIGTERM" in said:
                check_stopped(directory / "run", said)
                assert status == 75, said
            else:  # before it listens, or behind its last phase
                assert status in (0, -signal.SIGTERM), said
    assert matrix.run(directory) == 0, (directory / "said.txt").read_text()
    matrix.check(directory)
    print(f"\nSIGTERM {len(took)} times: {sorted(took)[len(took) // 2]:.1f} s in the median, {max(took):.1f} s at most")


def check_stopped(run: Path, said: str) -> None:
    """What a loop had done when it was stopped is in its newest checkpoint."""
    if "the newest checkpoint is of" not in said:
        return
    phase = "rl" if "RL iteration" in said.splitlines()[-1] else "sft"
    done = [row for row in tiny_run.metrics(run) if row["phase"] == phase]
    newest = max(int(path.name) for path in (run / "checkpoints" / phase).iterdir() if path.name.isdigit())
    assert newest == len(done) == 1 + done[-1]["step"], said

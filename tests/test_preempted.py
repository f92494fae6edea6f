"""A run that machines are taken from: two processes into a bucket, SIGTERM to one of them, and the same command again.

Each process has a cache directory of its own, as if it were on a host of its own: what one needs of the other comes
through the bucket.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny_run
from fake_gcs import FakeGCS
from two_processes import Pair, free_port, spawn, training

SETTINGS: dict[str, Any] = {
    "sft__epochs": 20, "sft__checkpoint_every": 100, "rl__iterations": 4, "rl__checkpoint_every": 100,
    "rl__eval_every": 4, "rollout__max_steps": 2, "phases": "[index, sft, rl]",
}  # fmt: skip
URL, STORED = "gs://bucket/runs/tiny", "bucket/runs/tiny/"
LIMIT_S = 60.0  # within which all processes end; promised in docs/reliability.md

pytestmark = [pytest.mark.slow, pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")]


@pytest.fixture
def gcs() -> Iterator[FakeGCS]:
    with FakeGCS().running() as server:
        yield server


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of a run that nobody stopped: one process, all its devices."""
    directory = tmp_path_factory.mktemp("whole")
    tiny_run.train(directory, base, **SETTINGS)
    return tiny_run.metrics(directory / "run")


def losses(rows: list[dict[str, Any]]) -> list[float]:
    """The losses of the cold start, of which every step must be there once."""
    rows = [row for row in rows if row["phase"] == "sft"]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]


def start_pair(recipe: Path, directory: Path, environment: dict[str, str]) -> Pair:
    words = ["mesh.distributed=true", "mesh.num_processes=2", f"mesh.coordinator=127.0.0.1:{free_port()}"]
    outputs = [directory / f"process-{rank}.txt" for rank in range(2)]
    processes = [
        spawn(
            [*training(recipe), *words, f"mesh.process_id={rank}"], 4, directory, outputs[rank],
            **environment | {"XDG_CACHE_HOME": str(directory / f"host-{rank}")},
        )
        for rank in range(2)
    ]  # fmt: skip
    return Pair(processes, outputs)


def num_rows(directory: Path, phase: str) -> int:
    """Lines of a phase in the metrics of the copy that process 0 works on, or of a local run."""
    found = [*directory.glob("host-0/r3rag_jax/runs/*/tiny/metrics.jsonl"), *directory.glob("run/metrics.jsonl")]
    return found[0].read_text().count(f'"phase": "{phase}"') if found else 0


def test_two_processes_into_a_bucket(gcs: FakeGCS, base: Path, tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base, run_dir=URL, **SETTINGS)
    for rank, phase, number in ((1, "sft", 3), (0, "rl", 1)):
        with start_pair(recipe, tmp_path, gcs.environment) as pair:
            pair.wait_until(lambda phase=phase, number=number: num_rows(tmp_path, phase) >= number)
            pair.send(rank, signal.SIGTERM)
            assert pair.statuses(LIMIT_S) == [75, 75], "\n".join(pair.said())
            for said in pair.said():
                assert "stopped: SIGTERM" in said and "is done, the newest checkpoint is of" in said
        names = gcs.names(STORED)
        assert not [name for name in names if "tmp" in name or name == ".lock"]
        assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} <= {"sft", "rl"}
        rows = [json.loads(line) for line in gcs.objects[f"{STORED}metrics.jsonl"][1].splitlines()]
        done = [row for row in rows if row["phase"] == phase]
        saved = {int(name.split("/")[2]) for name in names if name.startswith(f"checkpoints/{phase}/")}
        assert saved == {len(done)}  # the checkpoint is of the last step that is logged
        for host in range(2):
            shutil.rmtree(tmp_path / f"host-{host}")  # both machines are taken away
    environment = gcs.environment | {"XDG_CACHE_HOME": str(tmp_path / "host-0")}
    alone = spawn(training(recipe), 1, tmp_path, tmp_path / "alone.txt", **environment)
    said = (tmp_path / "alone.txt").read_text
    assert alone.wait(900) == 0, said()
    assert "rl resumes on another mesh (data=8 fsdp=1 tensor=1, processes=2 before, data=1 fsdp=1 tensor=1" in said()
    assert f"Report: {URL}/report.html" in said()
    rows = [json.loads(line) for line in gcs.objects[f"{STORED}metrics.jsonl"][1].splitlines()]
    assert losses(rows) == pytest.approx(losses(whole), rel=1e-3)
    assert [row["step"] for row in rows if row["phase"] == "rl"] == [0, 1, 2, 3]
    names = gcs.names(STORED)
    assert {"report.html", "policy/rl/.complete", "policy/rl/model.safetensors", "index/.complete"} <= {*names}


def stop_after(process: subprocess.Popen[str], is_there: Callable[[], bool], output: Path) -> None:
    """Send SIGTERM once something is there, and check how the process ends."""
    end = time.monotonic() + 600
    while not is_there():
        assert process.poll() is None and time.monotonic() < end, output.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT_S) == 75, output.read_text()


def test_eight_devices_then_one_then_four(base: Path, tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base, **SETTINGS | {"phases": "[index, sft]"})
    for devices, number in ((8, 3), (1, 6)):
        output = tmp_path / f"{devices}.txt"
        process = spawn(training(recipe), devices, tmp_path, output)
        stop_after(process, lambda number=number: num_rows(tmp_path, "sft") >= number, output)
    output = tmp_path / "4.txt"
    assert spawn(training(recipe), 4, tmp_path, output).wait(600) == 0, output.read_text()
    for devices, before in ((1, 8), (4, 1)):
        expected = f"sft resumes on another mesh (data={before} fsdp=1 tensor=1, processes=1 before, data={devices}"
        assert expected in (tmp_path / f"{devices}.txt").read_text()
    assert losses(tiny_run.metrics(tmp_path / "run")) == pytest.approx(losses(whole), rel=1e-3)

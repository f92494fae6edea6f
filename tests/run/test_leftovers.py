"""What killed processes leave in a run directory is removed and said; what lacks in the metrics is said."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r3rag_jax.config import Config
from r3rag_jax.run.directory import RunDirectory, hold_run
from r3rag_jax.run.leftovers import remove_leftovers, report_damaged, report_gaps, report_lost_metrics


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("half")
    return path


def test_leftovers_are_removed_and_said(dead: int, tmp_path: Path) -> None:
    host, said = platform.node(), list[str]()
    left = [
        write(tmp_path / "data" / f".rl.jsonl.{host}-{dead}.partial"),
        write(tmp_path / f".report.html.{host}-{dead}.partial"),
        write(tmp_path / "policy" / ".rl.partial" / "config.json").parent,
        write(tmp_path / "checkpoints" / "rl" / "3.orbax-checkpoint-tmp-0" / "note").parent,
    ]
    old = write(tmp_path / "eval" / ".r3rag.json.otherhost-7.partial")
    os.utime(old, (0, time.time() - 7200))
    kept = [
        write(tmp_path / "eval" / f".r3rag.json.{host}-{os.getpid()}.partial"),  # of a process that lives
        write(tmp_path / "eval" / ".r3rag.json.otherhost-9.partial"),  # it may live
        write(tmp_path / "policy" / "sft" / "config.json"),
        write(tmp_path / "checkpoints" / "rl" / "2" / "note"),
        write(tmp_path / ".index.partial" / "vectors.npy"),  # to be continued: there is no index yet
        write(tmp_path / ".lock"),
    ]
    remove_leftovers(tmp_path, tmp_path / "index", said.append)
    assert [path for path in [*left, old] if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []
    [sentence] = said
    assert sentence.startswith(f"removed what a killed process had left in {tmp_path}: .report.html.")
    assert "checkpoints/rl/3.orbax-checkpoint-tmp-0" in sentence and "policy/.rl.partial" in sentence
    remove_leftovers(tmp_path, tmp_path / "index", said.append)
    assert len(said) == 1


def test_half_an_index_beside_a_whole_one_is_removed_unless_it_is_being_built(tmp_path: Path) -> None:
    half = write(tmp_path / ".index.partial" / ".lock").parent
    write(tmp_path / "index" / "fingerprint.json")
    with (half / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers(tmp_path, tmp_path / "index", lambda text: None)
        assert half.exists()
    remove_leftovers(tmp_path, tmp_path / "index", lambda text: None)
    assert not half.exists()


def test_a_run_that_starts_removes_them(dead: int, tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path / "run"))
    left = write(tmp_path / "run" / f".config.yaml.{platform.node()}-{dead}.partial")
    with hold_run(config, RunDirectory(tmp_path / "run")):
        assert not left.exists()


def test_lost_metrics_are_said(tmp_path: Path) -> None:
    metrics, said = tmp_path / "metrics.jsonl", list[str]()
    report_gaps(metrics, "rl", 0, said.append)
    assert said == []
    lines = [f'{{"phase": "rl", "step": {step}}}\n' for step in range(12)]
    metrics.write_text("".join(lines))
    report_gaps(metrics, "rl", 12, said.append)
    report_damaged(metrics, said.append)
    assert said == []
    metrics.write_text('{"phase": "sft", "step": 1}\n[1]\n' + "".join(lines[8:]) + '{"phase": "rl", "st')
    report_gaps(metrics, "rl", 12, said.append)
    report_damaged(metrics, said.append)
    assert said == [
        f"{metrics} lacks 8 of 12 steps of phase rl (0, 1, 2, 3, 4, …): their lines were removed or damaged; the run "
        "goes on, its curves have a gap",
        f"{metrics}: 2 lines hold no JSON object and are dropped (2, 7): cut off, or damaged",
    ]
    for phase in ("sft", "rl", "other"):
        (tmp_path / "policy" / phase).mkdir(parents=True)
    del said[:]
    report_lost_metrics(tmp_path, metrics, said.append)
    assert [text.split(" of phase ")[1].split()[0].rstrip(",") for text in said] == ["other", "rl", "sft"]
    assert f"{metrics} has no line of phase other, which is finished" in said[0]

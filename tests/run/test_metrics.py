"""metrics.jsonl: a line per step, each step once after resuming, and a copy for trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from r3rag_jax.run.metrics import MetricsLog


class Recorder:
    """A tracker that remembers its calls."""

    def __init__(self, run_dir: Path = Path(), config: Mapping[str, Any] | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append((step, dict(metrics)))

    def trajectories(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        raise AssertionError("metrics are no trajectories")

    def finish(self) -> None:
        self.calls.append(("finish",))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_a_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("sft", 0, {"loss": np.float32(0.1), "tokens": jax.numpy.asarray(3)})
    log.write("rl", 0, {"reward": 1, "kl": math.nan})
    text = (tmp_path / "metrics.jsonl").read_text()
    first, second = rows(tmp_path / "metrics.jsonl")
    assert list(first) == ["phase", "step", "time_s", "loss", "tokens"]  # the order of the columns is part of the file
    assert first | {"time_s": 0} == {
        "phase": "sft", "step": 0, "time_s": 0, "loss": float(np.float32(0.1)), "tokens": 3.0,
    }  # fmt: skip
    assert (second["reward"], math.isnan(second["kl"])) == (1.0, True)
    assert text.endswith("}\n") and second["time_s"] >= first["time_s"] >= 0


def test_rewinding_drops_what_a_resumed_phase_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.rewind("rl", 0)  # there is nothing yet
    assert not path.exists()
    for phase, steps in (("sft", 3), ("rl", 4)):
        for step in range(steps):
            log.write(phase, step, {"loss": step})
    whole = path.read_text().splitlines()
    with path.open("a") as file:
        file.write('[1]\n{"phase": "rl"}\n\0\0}\n')  # no rows of metrics
        file.write('{"phase": "rl", "st')  # what a killed process leaves
    log.rewind("rl", 2)
    assert path.read_text().splitlines() == whole[:5]  # unchanged lines, letter by letter
    log.write("rl", 2, {"loss": 7})
    assert [(row["phase"], row["step"]) for row in rows(path)] == [
        ("sft", 0), ("sft", 1), ("sft", 2), ("rl", 0), ("rl", 1), ("rl", 2),
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


def test_trackers_get_the_same_names_under_the_phase(tmp_path: Path) -> None:
    one, other = Recorder(), Recorder()
    with MetricsLog(tmp_path / "metrics.jsonl", [one, other]) as log:
        log.write("sft", 4, {"loss": np.float32(0.5)})
        log.write("rl", 0, {"reward": 1, "judge_failures": 0})
    for recorder in (one, other):
        (step, metrics), (rl_step, rl_metrics), finish = recorder.calls
        assert (step, metrics.keys(), metrics["sft/loss"]) == (4, {"sft/time_s", "sft/loss"}, 0.5)
        assert (rl_step, list(rl_metrics)) == (0, ["rl/time_s", "rl/reward", "rl/judge_failures"])
        assert finish == ("finish",)
    for row, (step, metrics) in zip(rows(tmp_path / "metrics.jsonl"), one.calls[:2], strict=True):
        assert row == {"phase": row["phase"], "step": step} | {name.split("/")[1]: x for name, x in metrics.items()}


def test_trackers_are_finished_after_an_exception_too(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt), MetricsLog(tmp_path / "metrics.jsonl", [recorder]):
        raise KeyboardInterrupt
    assert recorder.calls == [("finish",)]


def test_only_process_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, recorder = tmp_path / "metrics.jsonl", Recorder()
    MetricsLog(path).write("rl", 3, {"reward": 1})
    before = path.read_bytes()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsLog(path, [recorder]) as log:
        log.write("rl", 4, {"reward": 2})
        log.rewind("rl", 0)
    assert path.read_bytes() == before
    assert recorder.calls == []

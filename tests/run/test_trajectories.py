"""The trajectories that RL keeps: some of every iteration, each iteration once after resuming."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from r3rag_jax.run.trajectories import TrajectoryLog


class Recorder:
    """A tracker that remembers the trajectories."""

    def __init__(self, run_dir: Path = Path(), config: Mapping[str, Any] | None = None) -> None:
        self.calls: list[tuple[int, list[Mapping[str, Any]]]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise AssertionError("trajectories are no metrics")

    def trajectories(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.calls.append((step, list(rows)))

    def finish(self) -> None:
        raise AssertionError("MetricsLog finishes trackers")


@pytest.mark.parametrize(
    ("limit", "num", "chosen"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 3, [0, 1, 2]),
        (2, 8, [0, 4]),
        (3, 8, [0, 2, 4, 6]),  # a spacing of 8 // 3
        (1, 5, [0]),
        (0, 8, []),
        (4, 0, []),
    ],
)
def test_trajectories_are_chosen_evenly(limit: int, num: int, chosen: list[int], tmp_path: Path) -> None:
    assert list(TrajectoryLog(tmp_path / "rl.jsonl", limit).choose(range(num))) == chosen


@pytest.mark.parametrize(
    ("limit", "chosen"),
    [(1, [0, 3, 5]), (3, [0, 3, 5]), (5, [0, 3, 5, 1, 2, 4]), (6, [0, 3, 5, 1, 2, 4]), (0, [])],
)
def test_all_samples_of_a_question_are_chosen_together(limit: int, chosen: list[int], tmp_path: Path) -> None:
    log = TrajectoryLog(tmp_path / "rl.jsonl", limit)
    assert list(log.choose(["a", "b", "c", "a", "c", "a"])) == chosen


def test_rows_carry_their_iteration_and_go_to_trackers(tmp_path: Path) -> None:
    path, recorder = tmp_path / "trajectories" / "rl.jsonl", Recorder()
    log = TrajectoryLog(path, 2, [recorder])
    log.write(0, [{"question": "Wer war Gödel?", "reward": 0.5}])
    log.write(1, [{"question": "a", "reward": 1.0}, {"question": "b", "reward": -1.0}])
    assert path.read_text(encoding="utf-8") == (
        '{"question": "Wer war Gödel?", "reward": 0.5, "iteration": 0}\n'
        '{"question": "a", "reward": 1.0, "iteration": 1}\n'
        '{"question": "b", "reward": -1.0, "iteration": 1}\n'
    )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert recorder.calls == [(0, rows[:1]), (1, rows[1:])]


def test_rewinding_drops_what_a_resumed_phase_repeats(tmp_path: Path) -> None:
    path = tmp_path / "trajectories" / "rl.jsonl"
    log = TrajectoryLog(path, 2)
    log.rewind(0)  # there is nothing yet
    assert not path.exists()
    for iteration in range(3):
        log.write(iteration, [{"question": "a\u2028b"}, {"question": "c"}])  # a line separator that JSON keeps
    whole = path.read_text(encoding="utf-8").split("\n")
    with path.open("a") as file:
        file.write('{"question": "of an evaluation"}\n{"iteration": "0"}\n')  # of another program
        file.write('{"question": "hal')  # what a killed process leaves
    log.rewind(2)
    assert path.read_text(encoding="utf-8").split("\n") == [*whole[:4], ""]
    log.write(2, [{"question": "again"}])
    assert len(path.read_text(encoding="utf-8").split("\n")) == 6


def test_nothing_is_written_with_a_limit_of_0_or_by_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    TrajectoryLog(tmp_path / "rl.jsonl", 0, [recorder]).write(0, [{"question": "a"}])
    log = TrajectoryLog(tmp_path / "other.jsonl", 2, [recorder])
    log.write(0, [{"question": "a"}])
    before = (tmp_path / "other.jsonl").read_bytes()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert list(log.choose(range(8))) == []
    log.write(1, [{"question": "a"}])
    log.rewind(0)
    assert (tmp_path / "other.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["other.jsonl"]
    assert len(recorder.calls) == 1

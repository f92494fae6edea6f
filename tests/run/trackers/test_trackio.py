"""The trackio tracker: what it writes is read back from trackio's database, and nothing goes over the network."""

from __future__ import annotations

import math
import shutil
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from r3rag_jax.errors import UserError
from r3rag_jax.run.trackers.trackio import TrackioTracker

TRAJECTORY = {
    "id": "q1", "question": "Who built the door?", "golden_answers": ["Ann"], "metadata": {"hops": 2},
    "status": "ANSWERED", "sample_index": 0, "reward": 0.5, "iteration": 3,
    "steps": [
        {"analysis": "I need the maker.", "query": "maker of the door",
         "passages": [{"id": "7", "contents": '"Door"\nAnn made it.'}, {"id": "8", "contents": '"Key"\nOf brass.'}]},
        {"analysis": "It is known.", "answer": "Ann"},
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def refused(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The connections that were tried, none of which is made; the environment is one that would cause some."""
    tried: list[object] = []

    def refuse(_: socket.socket, address: object) -> NoReturn:
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: refuse(None, address))  # type: ignore[arg-type]
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://localhost:1/?write_token=x")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "nobody/nothing")
    return tried


def run_directory(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_metrics_keep_their_names_and_steps(storage: Any, refused: list[object], tmp_path: Path) -> None:
    tracker = TrackioTracker(run_directory(tmp_path, "metrics"), {"seed": 3, "phases": ("sft", "rl")})
    tracker.log(0, {"sft/loss": 2.5})
    tracker.log(0, {"rl/reward": 0.1})
    tracker.log(7, {"rl/reward": -1.0, "rl/kl": math.nan})
    tracker.finish()
    [run] = storage.get_runs("metrics")
    logs = [{name: x for name, x in row.items() if name != "timestamp"} for row in storage.get_logs("metrics", run)]
    assert math.isnan(logs[2].pop("rl/kl"))
    assert logs == [{"step": 0, "sft/loss": 2.5}, {"step": 0, "rl/reward": 0.1}, {"step": 7, "rl/reward": -1.0}]
    config = storage.get_run_config("metrics", run)
    assert config["seed"] == 3 and config["phases"] == ["sft", "rl"]
    assert refused == []


def test_trajectories_are_traces(storage: Any, refused: list[object], tmp_path: Path) -> None:
    tracker = TrackioTracker(run_directory(tmp_path, "trajectories"), {})
    tracker.trajectories(3, [TRAJECTORY, TRAJECTORY | {"id": "q2", "status": "NO_ANSWER", "steps": []}])
    tracker.finish()
    [run] = storage.get_runs("trajectories")
    one, other = sorted(storage.get_traces("trajectories", run), key=lambda trace: trace["index"])
    assert one["step"] == other["step"] == 3
    assert one["messages"] == [
        {"role": "user", "content": "Who built the door?"},
        {"role": "assistant", "content": "I need the maker.\n\nquery: maker of the door"},
        {"role": "tool", "content": '"Door"\nAnn made it.\n\n"Key"\nOf brass.'},
        {"role": "assistant", "content": "It is known.\n\nanswer: Ann"},
    ]
    assert one["metadata"] == {name: x for name, x in TRAJECTORY.items() if name not in ("question", "steps")}
    assert (other["metadata"]["id"], other["metadata"]["status"]) == ("q2", "NO_ANSWER")
    assert refused == []


def test_a_resumed_run_continues_and_one_made_again_is_another(storage: Any, tmp_path: Path) -> None:
    for _ in range(2):
        run_dir = run_directory(tmp_path, "again")
        for start in (0, 2):
            tracker = TrackioTracker(run_dir, {})
            for step in range(start, start + 3):
                tracker.log(step, {"rl/reward": float(step)})
            tracker.finish()
        shutil.rmtree(run_dir)
    runs = storage.get_run_records("again")
    assert len({run["id"] for run in runs}) == len(runs) == 2
    for run in runs:
        logs = storage.get_logs("again", run["name"], run_id=run["id"])
        assert [row["step"] for row in logs] == [0, 1, 2, 2, 3, 4]


def test_nothing_is_written_before_the_first_metric(storage: Any, tmp_path: Path) -> None:
    run_dir = run_directory(tmp_path, "nothing")
    TrackioTracker(run_dir, {"seed": 3}).finish()
    assert list(run_dir.iterdir()) == []
    assert "nothing" not in storage.get_projects()


def test_a_name_that_trackio_reserves_is_the_users_to_change(storage: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"log\.trackers=trackio cannot track a run named registry-x: .*reserved"):
        TrackioTracker(tmp_path / "registry-x", {})

"""A whole run in miniature with all trackers: they hold what metrics.jsonl and trajectories/rl.jsonl hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
import wandb_files
from event_files import scalars, texts

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("phases", ["[index, sft]", pytest.param("[index, sft, rl]", marks=pytest.mark.slow)])
def test_trackers_hold_what_the_files_hold(
    phases: str, storage: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    settings = {
        "phases": phases,
        "sft__epochs": 1,
        "rl__iterations": 2,
        "log__trackers": "[tensorboard, trackio, wandb]",
    }
    tiny_run.train(tmp_path, base, "tags", log__trajectories=2, **settings)
    run_dir = tmp_path / "run"
    rows = lines(run_dir / "metrics.jsonl")
    names = ("phase", "step")
    want = [(f"{row['phase']}/{name}", row["step"], x) for row in rows for name, x in row.items() if name not in names]
    assert {row["phase"] for row in rows} == {"sft", "rl"} & set(phases.strip("[]").split(", "))
    assert scalars(run_dir / "tensorboard") == [(name, step, float(np.float32(x))) for name, step, x in want]
    run = json.loads((run_dir / "trackio.json").read_text())
    logs = storage.get_logs(run["project"], run["run"], run_id=run["id"])
    assert [(name, log["step"], x) for log in logs for name, x in log.items() if "/" in name] == want
    wandb.teardown()  # its own process writes the file
    calls = [call for call in wandb_files.history(run_dir / "wandb") if "trajectories/path" not in call]
    steps = [(name, call[f"{name.partition('/')[0]}/step"], x) for call in calls for name, x in call.items()]
    assert sorted(one for one in steps if not one[0].endswith("/step")) == sorted(want)
    config = storage.get_run_config(run["project"], run["run"], run_id=run["id"])
    assert config["rollout"]["protocol"] == "tags" and config["phases"] == phases.strip("[]").split(", ")

    if "rl" in phases:
        kept = lines(run_dir / "trajectories" / "rl.jsonl")
        traces = storage.get_traces(run["project"], run["run"], run_id=run["id"])
        traces = sorted(traces, key=lambda trace: (trace["step"], trace["index"]))
        assert {row["iteration"] for row in kept} == {0, 1}
        assert [trace["step"] for trace in traces] == [row["iteration"] for row in kept]
        for name in ("id", "reward"):
            assert [trace["metadata"][name] for trace in traces] == [row[name] for row in kept]
        tables = sorted((run_dir / "wandb").rglob("*.table.json"), key=lambda path: int(path.name.split("_")[1]))
        rewards = [cells[4] for path in tables for cells in json.loads(path.read_text())["data"]]
        assert rewards == [row["reward"] for row in kept]
        assert {step for name, step in texts(run_dir / "tensorboard") if name == "trajectories"} == {0, 1}

    before = tiny_run.files(run_dir)
    tiny_run.train(tmp_path, base, "tags", log__trajectories=2, **settings)
    assert tiny_run.files(run_dir).keys() == before.keys()  # a finished run opens no new event file
    assert storage.get_logs(run["project"], run["run"], run_id=run["id"]) == logs

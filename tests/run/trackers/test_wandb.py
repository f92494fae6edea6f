"""The W&B tracker: what it writes is read back from its offline files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from wandb_files import history, records

from r3rag_jax.run.trackers.wandb import WandbTracker

TRAJECTORY = {
    "id": "q1", "question": "Who built the door?", "golden_answers": ["Ann"], "status": "ANSWERED", "reward": 0.5,
    "steps": [
        {"analysis": "I need the maker.", "query": "maker", "passages": [{"id": "7", "contents": '"Door"\nOf Ann.'}]},
        {"analysis": "It is known.", "answer": "Ann"},
    ],
}  # fmt: skip


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, offline whatever the environment says."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return pytest.importorskip("wandb", reason="needs the extra wandb")


def test_a_resumed_run_continues_with_names_steps_and_tables(wandb: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    WandbTracker(run_dir, {"seed": 3}).finish()
    assert list(run_dir.iterdir()) == []  # nothing before the first metric
    for start in (0, 1):
        tracker = WandbTracker(run_dir, {"seed": 3, "rl": {"lr": 1e-6}, "path": tmp_path})
        tracker.log(start, {"sft/loss": 2.5, "sft/time_s": 0.1})
        tracker.log(start, {"rl/reward": -1.0, "rl/kl": math.nan})
        tracker.trajectories(start, [TRAJECTORY])
        tracker.finish()
    wandb.teardown()  # its own process writes the files
    id = json.loads((run_dir / "wandb.json").read_text())["id"]
    runs = [record.run for record in records(run_dir / "wandb") if record.WhichOneof("record_type") == "run"]
    assert [(run.run_id, run.display_name, run.project) for run in runs] == 2 * [(id, "mine", "r3rag")]
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert (config["seed"], config["rl"], config["path"]) == (3, {"lr": 1e-6}, str(tmp_path))
    logged = history(run_dir / "wandb")
    scalars = [call for call in logged if "trajectories/path" not in call]
    kl = [call.pop("rl/kl") for call in scalars if "rl/kl" in call]
    assert len(kl) == 2 and all(map(math.isnan, kl))
    assert scalars == [
        call
        for start in (0, 1)
        for call in ({"sft/loss": 2.5, "sft/time_s": 0.1, "sft/step": start}, {"rl/reward": -1.0, "rl/step": start})
    ]
    tables = [json.loads(path.read_text()) for path in (run_dir / "wandb").rglob("*.table.json")]
    assert [table["columns"][:3] for table in tables] == 2 * [["question", "gold", "answer"]]
    assert tables[0]["data"][0][:6] == ["Who built the door?", "Ann", "Ann", "ANSWERED", 0.5, 1]

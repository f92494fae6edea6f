"""The TensorBoard tracker: what it writes is read back from the event file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from event_files import scalars, texts

from r3rag_jax.run.trackers.tensorboard import TensorBoardTracker

pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")


def test_scalars_keep_their_names_and_steps(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path, {})
    tracker.log(0, {"sft/loss": 2.5})
    tracker.log(0, {"rl/reward": 0.1, "rl/tokens_per_s": 5400.0})
    tracker.log(7, {"rl/reward": -1.0, "rl/kl": math.nan, "rl/ratio": math.inf})
    tracker.finish()
    written = scalars(tmp_path / "tensorboard")
    *finite, kl, ratio = written
    assert finite == [
        ("sft/loss", 0, 2.5), ("rl/reward", 0, float(np.float32(0.1))), ("rl/tokens_per_s", 0, 5400.0),
        ("rl/reward", 7, -1.0),
    ]  # fmt: skip
    assert kl[:2] == ("rl/kl", 7) and math.isnan(kl[2])
    assert ratio == ("rl/ratio", 7, math.inf)


def test_trajectories_are_a_table_and_the_configuration_is_text(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path, {"seed": 3, "rl": {"lr": 1e-6}})
    steps = [
        {"analysis": "a|b", "query": "<b>", "passages": [{"id": "7", "contents": '"Door"\nAnn.'}]},
        {"answer": "x"},
    ]
    tracker.trajectories(4, [{"question": "Wer war Gödel?", "reward": 1.0, "steps": steps}, {"question": "Why?"}])
    tracker.finish()
    written = texts(tmp_path / "tensorboard")
    assert written["config", 0] == '```json\n{\n  "seed": 3,\n  "rl": {\n    "lr": 1e-06\n  }\n}\n```'
    header, rule, first, second = written["trajectories", 4].split("\n")
    assert header == "| question | gold | answer | status | reward | searches | steps |" and rule.count("---") == 7
    seen = 'a&#124;b<br>query: &#60;b&#62;<br>found: "Door"<br><br>answer: x'
    assert first == f"| Wer war Gödel? |  | x |  | 1.0 | 1 | {seen} |"
    assert second == "| Why? |  |  |  |  | 0 |  |"


def test_a_resumed_run_adds_to_the_same_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for start in (0, 2):
        monkeypatch.setattr("time.time", lambda start=start: 1e9 + start)  # names of event files have whole seconds
        tracker = TensorBoardTracker(tmp_path, {})
        for step in range(start, start + 3):
            tracker.log(step, {"rl/reward": float(step)})
        tracker.finish()
    steps = [step for _, step, _ in scalars(tmp_path / "tensorboard")]
    assert steps == [0, 1, 2, 2, 3, 4]


def test_nothing_is_written_before_the_first_metric(tmp_path: Path) -> None:
    TensorBoardTracker(tmp_path, {"seed": 3}).finish()
    assert list(tmp_path.iterdir()) == []

"""The trajectories that RL keeps: whole groups, with rewards, advantages and tokens."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run

from r3rag_jax.data.trajectories import trajectory_from_dict

KEYS = {"tokens", "logprobs"}


@pytest.mark.parametrize("protocol", ["tags", pytest.param("steps", marks=pytest.mark.slow)])
def test_rows_hold_what_rl_knows_of_steps_and_tokens(protocol: str, finished: Callable[[str], Path]) -> None:
    lines = (finished(protocol) / "trajectories" / "rl.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["iteration"] for row in rows} == {0, 1, 2}
    groups = Counter((row["iteration"], row["id"]) for row in rows)
    assert set(groups.values()) == {2}  # rollout.samples
    steps = [(step, number, row) for row in rows for number, step in enumerate(row["steps"])]
    for step, _, _ in steps:
        assert len(step["tokens"]) == len(step["logprobs"]) > 0
        assert all(logprob <= 0 for logprob in step["logprobs"])
        assert math.isfinite(step["advantage"])
        if "advantages" in step:
            assert sum(step["advantages"]) / len(step["tokens"]) == pytest.approx(step["advantage"], abs=1e-3)
        for name in ("query", "answer"):
            assert step.get(name, "") in "".join(step["tokens"])
    assert any(step["advantage"] != 0 for step, _, _ in steps)
    for row in rows:
        assert sum(step["reward"] for step in row["steps"]) == pytest.approx(row["reward"], abs=1e-3)
        assert trajectory_from_dict(row).num_retrievals == sum("query" in step for step in row["steps"])


@pytest.mark.slow
def test_entropies_are_recorded_where_that_is_asked_for(base: Path, tmp_path: Path) -> None:
    settings = {"phases": "[index, rl]", "rl__iterations": 1, "log__entropy": "true", "log__trajectories": 4}
    tiny_run.train(tmp_path, base, "tags", **settings)
    lines = (tmp_path / "run" / "trajectories" / "rl.jsonl").read_text("utf-8").splitlines()
    steps = [step for line in lines for step in json.loads(line)["steps"]]
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert steps and all(len(step["entropies"]) == len(step["tokens"]) for step in steps)
    assert all(0 <= entropy < 8 for step in steps for entropy in step["entropies"])  # ln 1024 and more
    found = [entropy for step in steps for entropy in step["entropies"]]
    assert 0.2 * metrics["entropy"] < sum(found) / len(found) < 5 * metrics["entropy"]  # of all trajectories

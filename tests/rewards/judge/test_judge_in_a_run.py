"""Whole runs with a judge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
from openai_server import Reply, chat, serve

from r3rag_jax import evaluate
from r3rag_jax.errors import UserError
from r3rag_jax.training.trainer import RLTrainer


class Judge:
    """Judges by the digest of a prompt, three in eight without a verdict, unless it is down."""

    def __init__(self) -> None:
        self.is_down = False
        self.judged: list[str] = []  # prompts that got a verdict

    def reply(self, body: dict[str, Any]) -> Reply:
        prompt = body["messages"][0]["content"]
        if self.is_down:
            return 503, b"out of memory"
        digest = hashlib.sha256(prompt.encode()).digest()[0]
        if digest % 8 < 3:
            return 200, chat("Hm.")
        self.judged.append(prompt)
        if "Search query" in prompt:
            return 200, chat(f"Relevance: {digest % 11 / 10}")
        return 200, chat(f"Correct: {'yes' if digest % 2 else 'no'}")


def check_iterations(rows: Sequence[dict[str, Any]]) -> None:
    """Three iterations of RL, whose rewards are the sums of their parts; some inquiries of some got no verdict."""
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        parts = [row[f"reward_{name}"] for name in ("outcome", "process", "format", "no_answer")]
        assert row["reward"] == pytest.approx(sum(parts), abs=1e-5)
        assert 0 <= row["judge_failure_rate"] <= 0.6 and 0 <= row["left_out"] < 1 and np.isfinite(row["loss"])
    assert any(row["judge_failure_rate"] > 0 for row in rows) and any(row["left_out"] > 0 for row in rows)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
@pytest.mark.slow
def test_a_run_whose_judge_goes_down_goes_on_where_it_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down behind the first update; the same command again, with the judge elsewhere, asks nothing twice."""
    judge, update = Judge(), RLTrainer.update

    def update_and_fall(self: Any, *args: Any) -> Any:
        judge.is_down = self.iteration == 0
        return update(self, *args)

    monkeypatch.setattr(RLTrainer, "update", update_and_fall)
    monkeypatch.setenv("MY_KEY", "secret-1")
    settings: dict[str, Any] = {
        "rewards__process": "judge", "rewards__outcome": "judge", "eval__judge": "true",
        "judge__endpoint__key_env": "MY_KEY", "judge__endpoint__model": "m", "judge__endpoint__retries": 0,
        "judge__max_failure_share": 0.6, "rl__algorithm": "rloo", "eval__systems": "[closed_book, r3rag]",
    }  # fmt: skip
    with serve(judge.reply) as endpoint, pytest.raises(UserError, match=r"judge\.endpoint\.url: .*out of memory"):
        tiny_run.train(tmp_path, base, judge__endpoint__url=endpoint.url, **settings)
    assert judge.is_down and {headers["Authorization"] for headers in endpoint.headers} == {"Bearer secret-1"}
    assert len(tiny_run.metrics(tmp_path / "run")) > 1
    judge.is_down = False
    with serve(judge.reply) as endpoint:
        tiny_run.train(tmp_path, base, judge__endpoint__url=endpoint.url, **settings)
    assert len(judge.judged) == len(set(judge.judged)) > 10
    check_iterations([row for row in tiny_run.metrics(tmp_path / "run") if row["phase"] == "rl"])
    kept = (tmp_path / "run" / "judgements.jsonl").read_text()
    assert '"failure"' in kept and "secret-1" not in kept + (tmp_path / "run" / "config.yaml").read_text()
    for system in ("closed_book", "r3rag"):
        summary = json.loads((tmp_path / "run" / "eval" / f"{system}.json").read_text())
        everything = summary["groups"]["all"]
        assert summary["fingerprint"]["judge"]["model"] == "m" and everything["acc"] >= everything["em"]
    test = tmp_path / "run" / "data" / "test.jsonl"
    flags = ["--checkpoint", str(tmp_path / "run"), "--questions", str(test), "--name", "again"]
    with serve(judge.reply) as endpoint:
        assert evaluate.main([*flags, f"judge.endpoint.url={endpoint.url}"]) == 0
    again = json.loads((tmp_path / "run" / "eval" / "again.json").read_text())
    assert again["groups"] == summary["groups"] and all("Hm." in str(judge.reply(body)) for body in endpoint.bodies)
    said = tiny_run.train(tmp_path, base, judge__endpoint__url="http://127.0.0.1:9", **settings)
    assert "eval  done before" in said and "ACC" in said
    with pytest.raises(UserError, match=r"judge\.endpoint\.model was 'm', now 'another'"):
        tiny_run.train(
            tmp_path,
            base,
            judge__endpoint__url="http://127.0.0.1:9",
            **settings | {"judge__endpoint__model": "another"},
        )

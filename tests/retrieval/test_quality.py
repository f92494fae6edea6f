"""Recall and nDCG by hand, and the files of questions that are read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.quality import Query, against_exact, measure, read_queries, read_trajectory_queries


def test_metrics_by_hand() -> None:
    found = [["a", "x", "b", "y"], ["x", "y"], []]
    relevant = [frozenset("ab"), frozenset("y"), frozenset("z")]
    metrics = measure(found, relevant, [1, 3])
    assert metrics["recall@1"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert metrics["recall@3"] == pytest.approx((1 + 1 + 0) / 3)
    assert metrics["all@3"] == pytest.approx(2 / 3) and metrics["all@1"] == 0
    second, third = 1 / math.log2(3), 1 / 2
    assert metrics["ndcg@1"] == pytest.approx(1 / 3)  # one hit is all that one place holds
    assert metrics["ndcg@3"] == pytest.approx(((1 + third) / (1 + second) + second + 0) / 3)
    exact = [["b", "a"], ["y", "q"], []]  # the last query has no hits in an exact search either
    assert against_exact(found, exact, [2]) == {
        "recall@2": pytest.approx((1 / 2 + 1 / 2) / 2),
        "ndcg@2": pytest.approx((1 / (1 + second) + second / (1 + second)) / 2),
    }


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_queries_of_questions_and_of_trajectories(tmp_path: Path) -> None:
    hops = [{"sub_question": "Where?", "answer": "x", "passage_id": 7}]
    rows = [
        {"id": "1", "question": "Who?", "golden_answers": ["x"], "metadata": {"supporting_ids": ["3", 4]}},
        {"id": "2", "question": "Why?", "golden_answers": ["x"], "metadata": {"decomposition": hops}},
    ]
    assert read_queries(write(tmp_path / "q", *rows)) == {
        "questions": [Query("Who?", frozenset(["3", "4"]))],
        "decomposed queries": [Query("Where?", frozenset(["7"]))],
    }
    steps = [
        {"analysis": "a", "query": "Where?", "passage_ids": ["7"]},
        {"analysis": "a", "query": "When?", "passage_ids": []},
        {"analysis": "a", "answer": "x"},
    ]
    assert read_trajectory_queries(write(tmp_path / "t", {"steps": steps})) == [Query("Where?", frozenset(["7"]))]
    with pytest.raises(UserError, match=r"metadata\.supporting_ids must name the passages of a question; no question"):
        read_queries(write(tmp_path / "q", rows[1]))
    rows[1]["metadata"]["decomposition"] = [{"sub_question": "Where?"}]
    with pytest.raises(UserError, match=r"q:2: metadata\.decomposition must list \{sub_question, passage_id\}"):
        read_queries(write(tmp_path / "q", *rows))
    with pytest.raises(UserError, match=r"t: a step must have query and passage_ids; no step has both"):
        read_trajectory_queries(write(tmp_path / "t", {"steps": steps[1:]}))

"""Two results of the same questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attempts import attempt, question

from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.comparison import compare
from r3rag_jax.evaluation.summary import summarise
from r3rag_jax.run.directory import RunDirectory

FACTS: dict[str, Any] = {
    "questions": "q", "split": "test", "num_questions": 6, "retrieval.top_k": 2, "policy": "rl 1",
}  # fmt: skip


def write(run: Path, right: str, **changes: Any) -> Path:
    """A result of one question per letter of `right`: `r` is right, `w` wrong, `-` without an answer."""
    answers = {"r": "Paris", "w": "The city of Rome", "-": None}
    trajectories = [attempt(question(str(i), "Paris"), answers[letter]) for i, letter in enumerate(right)]
    directory = RunDirectory(run)
    measured = summarise("r3rag", trajectories, FACTS | changes)
    directory.evaluation_dir.mkdir(parents=True, exist_ok=True)
    directory.evaluation("r3rag").write_text(json.dumps(measured.result))
    write_jsonl(directory.evaluation_rows("r3rag"), measured.rows)
    return directory.evaluation("r3rag")


def test_two_runs_on_the_same_questions(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", "rwww-r"), write(tmp_path / "b", "rrrr-w", policy="rl 2")
    found = compare(one, other)
    assert found.titles == ("a: R3-RAG", "b: R3-RAG") and found.varied == ""
    em = next(difference for difference in found.differences if difference.metric == "em")
    assert (em.num, em.only_one, em.only_other, em.p_value) == (6, 1, 3, 0.625)
    assert (em.one, em.other, em.test) == (pytest.approx(100 / 3), pytest.approx(400 / 6), "McNemar, exact")
    assert em.interval[0] < 0 < em.interval[1]
    tokens = next(difference for difference in found.differences if difference.metric == "output_tokens")
    assert (tokens.p_value, tokens.test, tokens.only_one, tokens.interval) == (1.0, "sign flips", None, (0.0, 0.0))
    assert "support_found" not in {difference.metric for difference in found.differences}  # nobody knows


def test_the_pairing_counts(tmp_path: Path) -> None:
    """The same two shares: p is small where one is right wherever the other is, and large where they share nothing."""
    half = write(tmp_path / "a", "r" * 8 + "w" * 12)
    nested, apart = write(tmp_path / "b", "r" * 16 + "w" * 4), write(tmp_path / "c", "wwww" + "r" * 16)
    p_values = [compare(half, other).differences[0].p_value for other in (nested, apart)]
    assert p_values == [pytest.approx(2 / 2**8), pytest.approx(0.0768, abs=1e-4)]


def test_unlike_results_are_refused_with_the_difference(tmp_path: Path) -> None:
    one = write(tmp_path / "a", "rw")
    other = write(tmp_path / "b", "rr", **{"retrieval.top_k": 5})
    with pytest.raises(
        UserError, match=r"they differ in retrieval\.top_k \(2, 5\): --varied retrieval\.top_k compares"
    ):
        compare(one, other)
    assert compare(one, other, ["retrieval.top_k"]).varied == "retrieval.top_k (2, 5)"
    asked = write(tmp_path / "c", "rr", questions="o", split="dev", num_questions=2)
    for varied in ([], ["questions"]):
        with pytest.raises(UserError, match=r"they differ in questions \(6 of test, 2 of dev\)$"):
            compare(one, asked, varied)
    three = write(tmp_path / "d", "rrr")
    with pytest.raises(UserError, match="must have files of the same questions"):
        compare(one, three)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match=r"a result must be a file eval/<name>\.json of a run, with a fingerprint"):
        compare(one, tmp_path / "x.json")
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read"):
        compare(tmp_path / "nowhere.json", one)

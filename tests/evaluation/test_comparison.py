"""Two results of the same questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attempts import attempt, question

from r3rag_jax import evaluate
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.comparison import compare, compare_runs
from r3rag_jax.evaluation.summary import summarise
from r3rag_jax.run.directory import RunDirectory

FACTS: dict[str, Any] = {
    "questions": "q", "split": "test", "num_questions": 6, "retrieval.top_k": 2, "policy": "rl 1",
}  # fmt: skip


def write(run: Path, right: str, name: str = "r3rag", kinds: str = "", **changes: Any) -> Path:
    """A result of one question per letter of `right`: `r` is right, `w` wrong, `-` without an answer.

    `kinds` has a letter for each: its type, and the number of its hops is how often it stands there.
    """
    answers = {"r": "Paris", "w": "The city of Rome", "-": None}
    metadata = [{"type": kind, "hops": kinds.count(kind)} for kind in kinds] or [{}] * len(right)
    trajectories = [
        attempt(question(str(i), "Paris", **metadata[i]), answers[letter]) for i, letter in enumerate(right)
    ]
    directory = RunDirectory(run)
    measured = summarise(name, trajectories, FACTS | changes)
    directory.evaluation_dir.mkdir(parents=True, exist_ok=True)
    directory.evaluation(name).write_text(json.dumps(measured.result))
    write_jsonl(directory.evaluation_rows(name), measured.rows)
    return directory.evaluation(name)


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


def test_two_systems_in_several_runs(tmp_path: Path) -> None:
    """Typed out: the four questions' means over two runs are 1, 1/2, 0, 0 and 1, 1, 1/2, 0."""
    pairs = [
        (
            write(tmp_path / run, one, "cold_start", "aabc", policy=f"sft {run}", cold_start=run),
            write(tmp_path / run, other, "r3rag", "aabc", policy=f"rl {run}", cold_start=run),
        )
        for run, one, other in (("x", "rrww", "rrrw"), ("y", "rwww", "rrww"))
    ]
    runs, means = compare_runs("xy", pairs, "em")
    assert [(row.name, row.num, row.one, row.other, row.p_value) for row in runs] == [
        ("x", 4, 50, 75, 1.0), ("y", 4, 25, 50, 1.0),
    ]  # fmt: skip
    assert [(row.name, row.num, row.one, row.other) for row in means] == [
        ("all", 4, 37.5, 62.5), ("a", 2, 75, 100), ("b", 1, 0, 50), ("c", 1, 0, 0), ("1 hop", 2, 0, 25),
        ("2 hops", 2, 75, 100),
    ]  # fmt: skip
    assert means[0].p_value == pytest.approx(0.5, abs=0.02)  # two differences of 1/2 each: both signs alike
    assert means[3].p_value == 1.0 and means[0].interval[0] >= 0


def test_several_runs_against_one_result_of_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Typed out: the baseline is right once in four, the runs' means are 1, 1/2, 1/2, 0."""
    baseline = write(tmp_path / "base", "wwwr", "ircot", **{"retrieval.top_k": 5})
    for run, right in (("x", "rrww"), ("y", "rwrw")):
        write(tmp_path / run, right, policy=f"rl {run}")
    words = ["runs", str(tmp_path / "x"), str(tmp_path / "y"), "--results", str(baseline), "r3rag"]
    assert evaluate.main(words) == 2
    assert "they differ in retrieval.top_k (5, 2)" in capsys.readouterr().err
    assert evaluate.main([*words, "--varied", "retrieval.top_k"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["n", "IRCoT", "R3-RAG", "difference", "95", "%", "interval", "p"] in lines
    assert {tuple(line[:-4]) for line in lines if line[:1] in (["x"], ["y"], ["mean"])} == {
        ("x", "4", "25.0", "50.0", "25.0"), ("y", "4", "25.0", "50.0", "25.0"),
        ("mean", "of", "2", "4", "25.0", "50.0", "25.0"),
    }  # fmt: skip


def test_many_small_differences_of_the_same_sign_are_no_chance(tmp_path: Path) -> None:
    pairs = []
    for run in range(3):  # each run alone: five more are right, p = 1/16; together fifteen other questions
        right = ["w"] * 15
        right[run * 5 : run * 5 + 5] = "rrrrr"
        folder = tmp_path / str(run)
        pairs.append((write(folder, "w" * 15, "cold_start"), write(folder, "".join(right))))
    runs, means = compare_runs("012", pairs, "em")
    assert all(row.p_value == pytest.approx(1 / 16) for row in runs)
    assert means[0].p_value < 0.001 and means[0].other == pytest.approx(100 / 3)


def test_runs_that_are_not_comparable_are_refused(tmp_path: Path) -> None:
    def pair(run: str, **changes: Any) -> tuple[Path, Path]:
        return write(tmp_path / run, "rw", "cold_start", **changes), write(tmp_path / run, "rr", **changes)

    one, other = pair("x"), pair("y", **{"retrieval.top_k": 5})
    with pytest.raises(UserError, match=r"they differ in retrieval\.top_k \(2, 5\)"):
        compare_runs("xy", [one, other], "em")
    with pytest.raises(UserError, match=r"--metric must be one that .* have \(em, .*\); got bleu$"):
        compare_runs("x", [one], "bleu")
    with pytest.raises(UserError, match=r"nowhere.* cannot be read"):
        compare_runs("xy", [one, (tmp_path / "nowhere.json", one[1])], "em")

"""Habits that a reward may teach, counted in typed-out trajectories."""

from __future__ import annotations

from pathlib import Path

import pytest
from attempts import BORN, DARWIN

from r3rag_jax import evaluate
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.trajectories import trajectory_to_dict
from r3rag_jax.evaluation.habits import Count, count_habits
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

ASKED = Question("1", "Where was the writer of Origin born?", ("Shrewsbury",), {"supporting_ids": ["a", "b"]})


def play(*steps: Step, question: Question = ASKED) -> Trajectory:
    return Trajectory(question, steps, Status.ANSWERED if steps[-1].answer else Status.NO_ANSWER)


def search(query: str, *passages: Passage, analysis: str = "I look it up.") -> Step:
    return Step(analysis, query=query, passages=passages)


def answer(text: str, analysis: str = "I know it.") -> Step:
    return Step(analysis, answer=text)


PLAIN = play(search("writer of Origin", DARWIN), search("birthplace of Darwin", BORN), answer("shrewsbury"))


@pytest.mark.parametrize(
    ("trajectory", "habit", "expected"),
    [
        (PLAIN, "repeated_query", Count(0, 2)),
        (play(search("writer of Origin"), search("The writer of origin!")), "repeated_query", Count(1, 2)),
        (PLAIN, "copied_title", Count(0, 2)),
        (play(search("Origin", DARWIN), search("the Origin")), "copied_title", Count(1, 2)),
        (play(search("origin")), "copied_title", Count(0, 1)),  # no passage has been shown
        (PLAIN, "guessed_query", Count(0, 2)),
        (play(search("Is Shrewsbury it?", BORN), search("who was born in Shrewsbury")), "guessed_query", Count(1, 2)),
        (play(search("Shrewsburys")), "guessed_query", Count(0, 1)),
        (PLAIN, "late_search", Count(0, 2)),
        (play(search("x", DARWIN, BORN), search("y"), answer("z")), "late_search", Count(1, 2)),
        (play(search("x"), question=Question("2", "Who?", ("x",))), "late_search", Count(0, 0)),
        (PLAIN, "unfounded_answer", Count(0, 1)),
        (play(answer("Shrewsbury")), "unfounded_answer", Count(1, 1)),
        (play(search("x", BORN), answer("in shrewsbury")), "unfounded_answer", Count(0, 1)),
        (play(answer("the Origin")), "unfounded_answer", Count(0, 1)),  # of the question
        (play(answer("Yes.")), "unfounded_answer", Count(0, 0)),
    ],
)  # fmt: skip
def test_each_habit(trajectory: Trajectory, habit: str, expected: Count) -> None:
    assert count_habits([trajectory])[habit] == expected


def test_a_query_that_is_only_yes_guesses_nothing() -> None:
    question = Question("3", "Are both rivers?", ("yes",))
    assert count_habits([play(search("yes"), question=question)])["guessed_query"] == Count(0, 1)


def test_words_and_names_that_another_policy_never_writes() -> None:
    same = play(search("Origin of writer", DARWIN), answer("SHREWSBURY 1809"))
    of_a_passage = play(search("the birthplace", DARWIN), search("Charles of birthplace"))
    too_early = play(search("Charles", DARWIN))  # the passage comes after the query
    mangled = play(search("writer", analysis="I ned it."), Step("ned Darvin", is_well_formed=False))
    counts = [count_habits([t], known=[PLAIN]) for t in (same, of_a_passage, too_early, mangled)]
    assert [count["foreign_words"] for count in counts] == [Count(0, 2), Count(0, 2), Count(0, 1), Count(2, 2)]
    assert [count["foreign_names"] for count in counts] == [Count(0, 2), Count(0, 2), Count(1, 1), Count(1, 2)]
    assert not {"foreign_words", "foreign_names"} & set(count_habits([mangled]))


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    files = [tmp_path / name / "trajectories" / "r3rag.jsonl" for name in ("before", "after")]
    for file, trajectory in zip(files, (PLAIN, play(search("xq"), search("Xq"))), strict=True):
        file.parent.mkdir(parents=True)
        write_jsonl(file, [trajectory_to_dict(trajectory)])
    evaluate.main(["habits", *map(str, files)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "before: r3rag after: r3rag"
    assert "query repeated 0.0 % (0 of 2) 50.0 % (1 of 2)" in lines
    assert "answer without evidence 0.0 % (0 of 1) —" in lines
    assert "words of its own — 50.0 % (1 of 2)" in lines
    assert "names of its own — 50.0 % (1 of 2)" in lines

    files[0].write_text("{}\n")
    assert evaluate.main(["habits", *map(str, files)]) == 2
    assert f"{files[0]}:1: expected a field" in capsys.readouterr().err

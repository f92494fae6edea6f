"""Evaluation: typed-out numbers, what makes two evaluations comparable, the baselines' reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.evaluator import fingerprint, measure, summarise
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.types import Passage, Question, Sample, Status, Step, Trajectory

DARWIN = Passage("a", '"Origin"\nOrigin was written by Charles Darwin.')
BORN = Passage("b", '"Charles Darwin"\nCharles Darwin was born in Shrewsbury.')


def question(id: str, *golds: str, **metadata: object) -> Question:
    return Question(id, f"Question {id}?", golds, metadata)


def attempt(asked: Question, answer: str | None, *passages: Passage, num_tokens: int = 10) -> Trajectory:
    """One retrieval per passage, then an answer or a malformed step."""
    steps = [Step("x", query="q", passages=(passage,)) for passage in passages]
    steps.append(Step("x", answer=answer) if answer is not None else Step("?", is_well_formed=False))
    status = Status.ANSWERED if answer is not None else Status.FORMAT_ERROR
    return Trajectory(asked, tuple(steps), status, num_tokens=num_tokens)


def attempts() -> list[Trajectory]:
    """Right (of two supporting passages one), right without supports, half right, none."""
    return [
        attempt(
            question("1", "The Shrewsbury", type="bridge", unseen=True, supporting_ids=["a", "b"]),
            "shrewsbury.",
            DARWIN,
        ),
        attempt(question("2", "x", "Charles Darwin", type="single", unseen=False), "Charles Darwin", num_tokens=20),
        attempt(
            question("3", "Darwin", type="bridge", unseen=False, supporting_ids=["b"]), "Charles Darwin", BORN, DARWIN
        ),
        attempt(question("4", "1809", type="bridge", unseen=True), None, num_tokens=33),
    ]


def test_measure_is_arithmetic() -> None:
    assert measure(attempts()) == {
        "num": 4,
        "em": 50.0,
        "f1": pytest.approx(100 * (1 + 1 + 2 / 3 + 0) / 4),
        "cover_em": 75.0,
        "retrievals": 0.75,
        "support_found": 75.0,  # 1/2 and 1/1, of the two questions that say
        "tokens_per_correct": pytest.approx((10 + 20 + 10 + 33) / 2),
        "no_answer": 25.0,
    }


def test_what_nothing_is_known_of_is_none() -> None:
    row = measure([attempt(question("4", "1809"), "1859")])
    assert row["tokens_per_correct"] is None
    assert row["support_found"] is None
    assert (row["em"], row["retrievals"], row["no_answer"]) == (0.0, 0.0, 0.0)


def test_tokens_are_counted_in_the_samples_where_no_number_is_given() -> None:
    mask = np.array([False, True, True])
    sample = Sample(np.arange(3, dtype=np.int32), mask, np.zeros(3, np.float32), np.where(mask, 0, -1).astype(np.int32))
    trajectory = dataclasses.replace(attempt(question("2", "x"), "x"), num_tokens=None, samples=(sample, sample))
    assert measure([trajectory])["tokens_per_correct"] == 4.0


def test_groups_by_type_and_by_seen() -> None:
    summary = summarise("r3rag", attempts(), {"questions": "abc"})
    assert (summary["system"], summary["title"], summary["num_questions"]) == ("r3rag", "R3-RAG", 4)
    assert summary["fingerprint"] == {"questions": "abc"}
    assert {name: group["num"] for name, group in summary["groups"].items()} == {
        "all": 4, "bridge": 3, "single": 1, "unseen": 2, "seen": 2,
    }  # fmt: skip
    assert {name: group["em"] for name, group in summary["groups"].items()} == {
        "all": 50.0, "bridge": pytest.approx(100 / 3), "single": 100.0, "unseen": 50.0, "seen": 50.0,
    }  # fmt: skip
    assert summary["groups"]["all"] == measure(attempts())
    assert summarise("mine", attempts()[:1], {})["title"] == "mine"


def test_judged_accuracy_is_of_what_was_judged() -> None:
    row = measure(attempts(), np.asarray([1, 1, np.nan, 0], np.float32))
    assert (row["acc"], row["judge_failures"]) == (pytest.approx(200 / 3), 1)
    assert {name: value for name, value in row.items() if name not in ("acc", "judge_failures")} == measure(attempts())
    assert measure(attempts()[:1], np.asarray([np.nan], np.float32))["acc"] is None


def test_a_judge_is_asked_about_answers_that_do_not_match(tmp_path: Path) -> None:
    class Agreeing:
        """Says yes to whatever it is asked, and remembers it."""

        is_collective, model, identity, place = False, "m", "m", "here"

        def __init__(self) -> None:
            self.prompts: list[str] = []

        def reply_all(self, prompts: Sequence[str]) -> Iterator[tuple[int, str | UserError]]:
            self.prompts += prompts
            yield from enumerate(["Correct: yes"] * len(prompts))

        def give_up(self) -> None: ...

    chat = Agreeing()
    summary = summarise("r3rag", attempts(), {}, Judge(chat, tmp_path / "judgements.jsonl"))
    assert len(chat.prompts) == 1 and "Question 3?" in chat.prompts[0]
    assert {name: group["acc"] for name, group in summary["groups"].items()} == {
        "all": 75.0, "bridge": pytest.approx(200 / 3), "single": 100.0, "unseen": 50.0, "seen": 100.0,
    }  # fmt: skip
    assert all(group["judge_failures"] == 0 for group in summary["groups"].values())


def test_fingerprints_tell_questions_index_and_top_k_apart() -> None:
    asked = [question("1", "x"), question("2", "y")]
    mark = fingerprint(asked, index="i", top_k=2)
    assert mark == fingerprint(iter(asked), index="i", top_k=2)
    assert (mark["index"], mark["top_k"], len(mark["questions"])) == ("i", 2, 16)
    others = [
        fingerprint(asked, index="j", top_k=2),
        fingerprint(asked, index="i", top_k=5),
        fingerprint(asked[::-1], index="i", top_k=2),
        fingerprint(asked[:1], index="i", top_k=2),
        fingerprint([asked[0], question("2", "z")], index="i", top_k=2),
        fingerprint([asked[0], question("3", "y")], index="i", top_k=2),
    ]
    assert len({tuple(other.items()) for other in [mark, *others]}) == 7

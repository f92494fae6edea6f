"""The loop: who is asked again and who is not, what is accepted, and what ends a build."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
from parts import DARWIN, MARX, PASSAGES, QUESTIONS, Replies, gold_answer
from scripted_teacher import ScriptedTeacher

from r3rag_jax.coldstart import rejection
from r3rag_jax.coldstart.builder import Builder, Limits
from r3rag_jax.coldstart.journal import Journal, open_journal
from r3rag_jax.coldstart.rejection import Gate
from r3rag_jax.coldstart.replay import differences, fault_of
from r3rag_jax.errors import UserError
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Question, Trajectory

Build = Callable[..., tuple[list[Trajectory], Builder]]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with open_journal(tmp_path / "journal.jsonl", print) as opened:
        yield opened


def build(
    journal: Journal, codec: Codec, replies: Replies, questions: Sequence[Question] = QUESTIONS, *,
    judge: Any = None, temperatures: tuple[float, ...] = (0.1, 0.9), min_searches: int = 1, env: Any = None,
    cost: Callable[[], float] = lambda: 0.0, advance: Callable[..., None] = lambda count, **numbers: None,
    made: list[Builder] | None = None, **limits: Any,
) -> tuple[list[Trajectory], Builder]:  # fmt: skip
    source = parts.source(replies, codec, temperatures)
    search_env = env or parts.search_env(codec)
    gate = Gate(
        min_searches=min_searches, evidence_fault=source.fault_of,
        policy_fault=lambda trajectory: fault_of(trajectory, codec, search_env), judge=judge,
    )  # fmt: skip
    builder = Builder(source, gate, journal, Limits(**limits), slots=2, cost=cost, advance=advance)
    if made is not None:
        made.append(builder)
    return builder.run(questions), builder


def at_first(error: Callable[[str], str]) -> Replies:
    """A teacher that errs at temperature 0.1."""
    return Replies(lambda prompt, t: error(gold_answer(prompt, t)) if t == 0.1 else gold_answer(prompt, t))


def test_a_question_is_asked_until_an_attempt_is_accepted(journal: Journal, codec: Codec) -> None:
    def answer(prompt: str, temperature: float) -> str:
        text = gold_answer(prompt, temperature)
        return text.replace("answer: Shrewsbury", "answer: London") if temperature == 0.1 else text

    replies, shown = Replies(answer), list[tuple[int, dict[str, float]]]()
    accepted, builder = build(journal, codec, replies, advance=lambda count, **numbers: shown.append((count, numbers)))
    assert [(t.question.id, t.answer, t.sample_index) for t in accepted] == [
        ("q1", "Shrewsbury", 1),
        ("q2", "Trier", 0),
    ]
    assert [temperature for _, temperature in replies.asked] == [0.1] * 6 + [0.9] * 3
    tally = builder.tally
    assert (tally.attempts, tally.accepted, dict(tally.rejected)) == (3, 2, {rejection.WRONG: 1})
    assert tally.at_temperature == {0.1: [2, 1], 0.9: [1, 1]}
    assert sum(count for count, _ in shown) == 2 and shown[-1][1]["accepted"] == 2
    assert shown[-1][1]["percent_of_attempts"] == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (lambda text: text.replace("Step 2:", "Step two:"), "a step is malformed"),
        (lambda text: text.replace("final answer: ", "final answer: not "), "the answer is wrong"),
        (lambda text: text.replace("final answer:", "retrieval query:"), "no answer in rollout.max_steps steps"),
        (lambda text: f"{text[:7]}\nThe problem analysis: hm\nThe final answer: Trier", "too few searches"),
        (lambda text: text.replace("analysis: ", "analysis: " + 1000 * "x"), "the policy cannot play it"),
    ],
)
def test_reasons_of_rejection(journal: Journal, codec: Codec, error: Callable[[str], str], reason: str) -> None:
    accepted, builder = build(journal, codec, at_first(error), [MARX])
    assert dict(builder.tally.rejected) == {reason: 1}
    assert [t.sample_index for t in accepted] == [1]


def test_what_the_policy_cannot_play_is_said(journal: Journal, codec: Codec) -> None:
    replies = Replies(gold_answer)
    for settings, words in (
        ({"max_new_tokens": 20}, "step 1 is longer than rollout.max_new_tokens"),
        ({"max_length": 700, "max_new_tokens": 300}, "rollout.max_length is full at step 3"),
        ({"max_steps": 2}, "rollout.max_steps or rollout.max_trajectory_tokens is used up at step 2"),
    ):
        _, builder = build(journal, codec, replies, env=parts.search_env(codec, **settings))
        assert builder._gate.first_fault == words
    assert len(replies.asked) == 2 * 2 * 3  # the attempts of the journal were judged again


def test_a_finished_build_asks_nothing(journal: Journal, codec: Codec) -> None:
    first, _ = build(journal, codec, at_first(lambda text: "hm"))
    again, builder = build(journal, codec, replies := Replies(gold_answer))
    assert again == first and replies.asked == [] and builder.tally.num_new == 0
    assert builder.tally.attempts == 4


def test_a_build_that_was_stopped_makes_the_attempts_that_are_missing(journal: Journal, codec: Codec) -> None:
    calls = iter(range(5))

    def stops(prompt: str, temperature: float) -> str:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return gold_answer(prompt, temperature)

    with pytest.raises(KeyboardInterrupt):
        build(journal, codec, Replies(stops))
    assert len([*journal.attempts()]) < 2
    done = len([*journal.attempts()])
    accepted, _ = build(journal, codec, replies := Replies(gold_answer))
    assert len(accepted) == 2 and len(replies.asked) == 3 * (2 - done)


def test_a_journal_that_is_being_judged_is_told_from_one_that_was(journal: Journal, codec: Codec) -> None:
    class AwayJudge(KindJudge):
        def ask(self, inquiries: list[str]) -> Any:
            raise UserError("away")

    wrong = Replies(lambda prompt, t: gold_answer(prompt, t).replace("answer: ", "answer: maybe "))
    _, builder = build(journal, codec, wrong, [MARX], temperatures=(0.1,))
    assert builder.has_judged_journal
    with pytest.raises(UserError, match="away"):
        build(journal, codec, wrong, [MARX], judge=AwayJudge(), made=(made := []))
    assert not made[0].has_judged_journal


def test_more_questions_and_temperatures_go_on_from_a_journal(journal: Journal, codec: Codec) -> None:
    build(journal, codec, at_first(lambda text: "hm"), [DARWIN], temperatures=(0.1,))
    replies = Replies(gold_answer)
    accepted, _ = build(journal, codec, replies, QUESTIONS, temperatures=(0.1, 0.5))
    assert [(t.question.id, t.sample_index) for t in accepted] == [("q1", 1), ("q2", 0)]
    assert {temperature for _, temperature in replies.asked} == {0.1, 0.5}


def test_attempts_at_another_question_of_the_same_id_do_not_count(journal: Journal, codec: Codec) -> None:
    build(journal, codec, Replies(gold_answer), [DARWIN])
    other = dataclasses.replace(MARX, id=DARWIN.id)
    accepted, _ = build(journal, codec, replies := Replies(gold_answer), [other])
    assert [t.answer for t in accepted] == ["Trier"] and len(replies.asked) == 3


def test_several_different_trajectories_of_a_question(journal: Journal, codec: Codec) -> None:
    def answer(prompt: str, temperature: float) -> str:
        text = gold_answer(prompt, temperature)
        return text.replace("query: Who wrote", "query: I ask who wrote") if temperature == 0.9 else text

    accepted, builder = build(journal, codec, Replies(answer), [DARWIN], temperatures=(0.1, 0.4, 0.9, 1.0), keep=2)
    assert [t.sample_index for t in accepted] == [0, 2]
    assert dict(builder.tally.rejected) == {rejection.DUPLICATE: 1}
    fewer, builder = build(journal, codec, Replies(answer), [DARWIN], temperatures=(0.1, 0.4, 0.9, 1.0))
    assert [t.sample_index for t in fewer] == [0]


def test_limits_end_a_build(journal: Journal, codec: Codec) -> None:
    accepted, builder = build(journal, codec, replies := Replies(gold_answer), num_trajectories=1)
    assert len(accepted) == 1 and builder.tally.ended_by == "coldstart.num_trajectories"
    accepted, _ = build(journal, codec, replies)
    assert len(accepted) == 2 and len(replies.asked) <= 9  # the other one had begun, and is begun again


def test_the_cost_ends_a_build(journal: Journal, codec: Codec) -> None:
    replies = Replies(lambda prompt, temperature: "hm")
    _, builder = build(journal, codec, replies, cost=lambda: 0.5 * len(replies.asked), max_cost=1.5)
    assert builder.tally.ended_by == "coldstart.max_cost" and len(replies.asked) == 4  # two at a time


def test_a_text_that_is_there_twice_is_asked_once(journal: Journal, codec: Codec) -> None:
    twin = dataclasses.replace(DARWIN, id="q9", question=f" {DARWIN.question.upper()}")
    accepted, builder = build(journal, codec, Replies(gold_answer), [*QUESTIONS, twin])
    assert [t.question.id for t in accepted] == ["q1", "q2"] and builder.tally.num_repeated == 1


def test_an_attempt_with_a_failed_request_is_made_again(journal: Journal, codec: Codec) -> None:
    from r3rag_jax.coldstart.teacher import FAILED

    replies = Replies(gold_answer)
    whole = replies.backend._complete
    replies.backend._complete = lambda slot, context: [FAILED] if context.temperature == 0.1 else whole(slot, context)
    accepted, builder = build(journal, codec, replies, [DARWIN])
    assert builder.tally.num_failed == 1 and [t.sample_index for t in accepted] == [1]
    _, builder = build(journal, codec, replies := Replies(gold_answer), [DARWIN], keep=2)
    assert [temperature for _, temperature in replies.asked] == [0.1] * 3


class KindJudge:
    """Calls every answer right that is no refusal, a round at a time."""

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def correctness(self, question: Question, answer: str) -> str:
        return answer

    def ask(self, inquiries: list[str]) -> Any:
        self.rounds.append(len(inquiries))
        values = [np.nan if answer == "about Trier" else float("born in" in answer) for answer in inquiries]
        return type("Verdicts", (), {"values": np.asarray(values, np.float32)})


def test_a_judge_decides_on_answers_that_are_no_exact_match(journal: Journal, codec: Codec) -> None:
    def wordy(prompt: str, temperature: float) -> str:
        text = gold_answer(prompt, temperature)
        return text.replace("answer: Shrewsbury", "answer: born in Shrewsbury").replace("answer: Trier", "answer: Bonn")

    judge = KindJudge()
    accepted, builder = build(journal, codec, Replies(wordy), judge=judge)
    assert [t.answer for t in accepted] == ["born in Shrewsbury"] and judge.rounds == [2, 1]
    assert dict(builder.tally.rejected) == {rejection.WRONG: 2}
    strict, _ = build(journal, codec, Replies(wordy))  # the journal, judged by exact match
    assert strict == []


def test_an_answer_that_the_judge_fails_on_is_not_accepted(journal: Journal, codec: Codec) -> None:
    replies = Replies(lambda prompt, t: gold_answer(prompt, t).replace("answer: Trier", "answer: about Trier"))
    accepted, builder = build(journal, codec, replies, [MARX], judge=KindJudge(), temperatures=(0.1,))
    assert accepted == [] and dict(builder.tally.rejected) == {rejection.NOT_JUDGED: 1}


def test_errors_at_a_known_rate_are_all_found(journal: Journal, codec: Codec) -> None:
    """16 questions about two works, and a teacher that errs in half of its attempts."""
    questions = [
        dataclasses.replace(q, id=f"{q.id}-{i}", question=f"{q.question[:-1]}, {i}?")
        for q in QUESTIONS
        for i in range(8)
    ]
    teacher = ScriptedTeacher(questions, error_rate=0.5)
    replies = Replies(teacher.step)
    accepted, _ = build(journal, codec, replies, questions)
    faultless = {q.id: [t for t in (0.1, 0.9) if teacher.error(q, t) in ("", "chatty")] for q in questions}
    assert {t.question.id for t in accepted} == {id for id, good in faultless.items() if good}
    assert len({(prompt, t) for prompt, t in replies.asked}) == len(replies.asked)
    assert differences(accepted, codec, parts.search_env(codec), parts.WordRetriever(PASSAGES), slots=3) == []
    changed = parts.WordRetriever(PASSAGES[1:])
    assert len(differences(accepted, codec, parts.search_env(codec), changed, slots=3)) > 0

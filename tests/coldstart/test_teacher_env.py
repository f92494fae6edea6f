"""Algorithm 1 as an Env: what the teacher is shown, and how an attempt ends."""

from __future__ import annotations

from pathlib import Path

import parts
import pytest
import tiny
from parts import DARWIN, PASSAGES, Replies, gold_answer

from r3rag_jax.coldstart.journal import Attempt
from r3rag_jax.coldstart.sources import TeacherSource
from r3rag_jax.coldstart.teacher import CUT_OFF, FAILED
from r3rag_jax.coldstart.teacher_env import TeacherEnv
from r3rag_jax.rollout.env import Done, Search
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Completion, Context, Status, Trajectory


def attempt(source: TeacherSource, number: int = 0) -> Trajectory:
    made: list[Attempt | None] = []
    source.play([DARWIN], number, lambda attempt, question: made.append(attempt))
    [one] = made
    assert one is not None
    return one.trajectory


def test_an_attempt_that_reaches_the_answer(codec: Codec) -> None:
    replies = Replies(gold_answer)
    trajectory = attempt(parts.source(replies, codec), 1)
    assert trajectory.status is Status.ANSWERED and trajectory.answer == "Shrewsbury"
    assert [step.query for step in trajectory.steps] == ["Who wrote Origin?", "Where was Charles Darwin born?", None]
    assert [step.passages for step in trajectory.steps] == [(PASSAGES[0],), (PASSAGES[1],), ()]
    assert trajectory.sample_index == 1 and trajectory.samples == ()
    assert [temperature for _, temperature in replies.asked] == [0.9] * 3


def test_the_prompts_hold_what_was_written_and_found(codec: Codec) -> None:
    replies = Replies(gold_answer)
    trajectory = attempt(parts.source(replies, codec))
    first, second, third = (prompt for prompt, _ in replies.asked)
    history = (
        f"The question: {DARWIN.question}\n"
        f"Step 1:\nThe problem analysis: {trajectory.steps[0].analysis}\n"
        "The retrieval query: Who wrote Origin?\n"
        'The retrieval documents: "Origin"\nOrigin was written by Charles Darwin.'
    )
    assert f"so far:\n\nThe question: {DARWIN.question}\n\nWrite step 1 of at most 4." in first
    assert f"so far:\n\n{history}\n\nWrite step 2 of at most 4. " in second
    assert f"{history}\nStep 2:\n" in third and "{" not in third
    assert "This is the last step" not in third


def test_the_teacher_sees_passages_as_the_policy_does(tmp_path: Path) -> None:
    codec = parts.codec(tmp_path, passage_tokens=12)
    replies = Replies(gold_answer)
    attempt(parts.source(replies, codec))
    assert replies.asked[1][0].partition("documents: ")[2].partition("\n\n")[0] != ""
    assert 'The retrieval documents: "Origin"\nOri\n' in replies.asked[1][0]


def test_the_last_step_must_answer(codec: Codec) -> None:
    def searching(prompt: str, temperature: float) -> str:
        number = prompt.rpartition("Write step ")[2].partition(" ")[0]
        return f"Step {number}:\nThe problem analysis: hm\nThe retrieval query: written"

    replies = Replies(searching)
    trajectory = attempt(parts.source(replies, codec))
    assert trajectory.status is Status.NO_ANSWER and len(trajectory.steps) == 4 == len(replies.asked)
    assert replies.asked[-1][0].endswith('This is the last step: it must hold "The final answer:".')
    assert len({passage.id for step in trajectory.steps for passage in step.passages}) > 1  # none is shown twice


@pytest.mark.parametrize(
    "reply",
    ["", "I think it was Darwin.", "Step 2:\nThe problem analysis: x\nThe final answer: y", "<think>Step 1:\n"],
)
def test_a_malformed_step_ends_the_attempt(codec: Codec, reply: str) -> None:
    trajectory = attempt(parts.source(Replies(lambda prompt, temperature: reply), codec))
    assert trajectory.status is Status.FORMAT_ERROR and not trajectory.steps[-1].is_well_formed


def test_what_a_reasoning_model_thinks_is_no_part_of_the_step(codec: Codec) -> None:
    replies = Replies(lambda prompt, t: f"<think>Step 1:\nThe final answer: no\n</think>\n\n{gold_answer(prompt, t)}")
    trajectory = attempt(parts.source(replies, codec))
    assert trajectory.status is Status.ANSWERED and "<think>" not in trajectory.steps[0].analysis


def env(codec: Codec, **settings: object) -> TeacherEnv:
    return TeacherEnv(RolloutRequest(DARWIN), parts.rules(codec, **settings))


def test_a_step_that_is_cut_off_is_malformed(codec: Codec) -> None:
    one = env(codec)
    context = one.start()
    assert isinstance(context, Context)
    text = gold_answer("".join(map(chr, context.ids)), 0.0)
    done = one.step(Completion([*map(ord, text), CUT_OFF], None))
    assert isinstance(done, Done) and done.trajectory.status is Status.FORMAT_ERROR


TAILS = ["\nStep 2:\nThe problem", "  \n", "\nThe retrieval documents:", "\nThe retrieval documents: x"]


@pytest.mark.parametrize("tail", TAILS)
def test_a_step_that_was_whole_before_the_reply_was_cut_off_counts(codec: Codec, tail: str) -> None:
    one = env(codec)
    context = one.start()
    assert isinstance(context, Context)
    text = gold_answer("".join(map(chr, context.ids)), 0.0)
    search = one.step(Completion([*map(ord, text + tail), CUT_OFF], None))
    assert isinstance(search, Search) and search.query == "Who wrote Origin?"


def test_a_request_that_failed_ends_the_attempt_unfinished(codec: Codec) -> None:
    one = env(codec)
    one.start()
    assert isinstance(one.step(Completion([FAILED], None)), Done) and one.has_failed
    made: list[Attempt | None] = []
    replies = Replies(gold_answer)
    replies.backend._complete = lambda slot, context: [FAILED]
    parts.source(replies, codec).play([DARWIN], 0, lambda attempt, question: made.append(attempt))
    assert made == [None]


def test_a_context_that_is_full_ends_the_attempt(codec: Codec) -> None:
    one = env(codec, max_tokens=1 << 41)
    done = one.start()
    assert isinstance(done, Done) and done.trajectory.status is Status.CONTEXT_FULL


def test_searches_go_deep_enough_for_what_was_shown(codec: Codec) -> None:
    one = env(codec)
    one.start()
    reply = "Step 1:\nThe problem analysis: hm\nThe retrieval query: written"
    search = one.step(Completion([*map(ord, reply), 0x110000], None))
    assert isinstance(search, Search) and search.k == 1
    one.observe(tiny.DictRetriever(PASSAGES).search(["written"], 1)[0])
    search = one.step(Completion([*map(ord, reply.replace("1", "2")), 0x110000], None))
    assert isinstance(search, Search) and search.k == 2

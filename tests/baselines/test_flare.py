"""FLARE: which sentences are sure, what the unsure ones ask for, and who can play it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from playing import DARWIN, ORIGIN, QUESTION, play

from r3rag_jax.errors import UserError
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Status, Step

ASKED = f"Question: {QUESTION.question}\nReasoning:"
SURE, UNSURE = " The author is Charles Darwin.", " Charles Darwin was born in ?London?."
ANSWER = " So the answer is: Shrewsbury."


def probabilities(tokenizer: Tokenizer, inside: float = 0.1, outside: float = 0.9):
    """Tokens between two question marks, and these, have the probability `inside`, all others `outside`."""

    def logprobs_of(ids: Sequence[int]) -> list[float]:
        text = tokenizer.decode(ids)
        assert len(text) == len(ids) or ids == [tokenizer.eos_id]
        first, last = text.find("?"), text.rfind("?")
        is_inside = [first <= i <= last and first >= 0 for i in range(len(ids))]
        return [math.log(inside if unsure else outside) for unsure in is_inside]

    return logprobs_of


def test_an_unsure_sentence_is_a_query_and_is_written_again(tokenizer: Tokenizer) -> None:
    again = " Charles Darwin was born in ?Shrewsbury?."
    played = play(tokenizer, "flare", [SURE, UNSURE, again, ANSWER], logprobs_of=probabilities(tokenizer))
    masked = "Charles Darwin was born in"
    assert played.asked == [(QUESTION.question, 1), (masked, 1)]
    assert played.trajectory.steps == (
        Step("", query=QUESTION.question, passages=(ORIGIN,)),
        Step(f"{SURE}{UNSURE}".strip(), query=masked, passages=(DARWIN,)),
        Step(again.strip(), answer="Shrewsbury"),
    )
    assert played.prompts[0].endswith(f"\n\n{ORIGIN.contents}\n{ASKED}")
    assert played.prompts[1].endswith(f"\n\n{ORIGIN.contents}\n{ASKED}{SURE}")
    assert played.prompts[2].endswith(f"\n\n{DARWIN.contents}\n{ASKED}{SURE}")  # without the unsure sentence
    assert played.prompts[3].endswith(f"\n\n{DARWIN.contents}\n{ASKED}{SURE}{again}")  # accepted, sure or not
    assert played.budgets == [64] * 4 and played.trajectory.num_policy_tokens == sum(
        len(tokenizer.encode(line)) for line in (SURE, UNSURE, again, ANSWER)
    )


@pytest.mark.parametrize(
    ("inside", "settings", "query"),
    [
        (0.81, {}, None),  # at least the threshold, 0.8
        (0.79, {}, UNSURE.strip(" .")),  # below it, but not below 0.4, so that nothing is masked
        (0.41, {}, UNSURE.strip(" .")),
        (0.39, {}, "Charles Darwin was born in"),
        (0.39, {"flare__mask_below": 0.0}, UNSURE.strip(" .")),
        (0.39, {"flare__threshold": 0.3}, None),
        (0.95, {"flare__threshold": 1.0}, UNSURE.strip(" .")),
    ],
)
def test_thresholds(tokenizer: Tokenizer, inside: float, settings: dict[str, float], query: str | None) -> None:
    outside = 1.0
    lines = [UNSURE, *([SURE] if query else []), ANSWER]
    played = play(tokenizer, "flare", lines, logprobs_of=probabilities(tokenizer, inside, outside), **settings)
    assert played.queries[1:] == ([query] if query else [])


def test_a_sentence_without_a_sure_token_asks_for_nothing(tokenizer: Tokenizer) -> None:
    played = play(tokenizer, "flare", [SURE, ANSWER], logprobs_of=lambda ids: [-5.0] * len(ids))
    assert (played.queries, played.trajectory.answer) == ([QUESTION.question], "Shrewsbury")


def test_an_unsure_answer_is_looked_up_too(tokenizer: Tokenizer) -> None:
    unsure = " So the answer is: ?London?"
    played = play(tokenizer, "flare", [unsure, ANSWER], logprobs_of=probabilities(tokenizer))
    assert (played.queries[1:], played.trajectory.answer) == (["So the answer is:"], "Shrewsbury")


def test_the_answer_is_asked_for(tokenizer: Tokenizer) -> None:
    """After so many tokens of sentences, and where the model ends its chain; the answer is not looked up."""
    sure = probabilities(tokenizer)
    length = len(tokenizer.encode(SURE))
    lines = [SURE, SURE, " ?London?."]
    played = play(tokenizer, "flare", lines, logprobs_of=sure, flare__max_tokens=2 * length)
    assert played.prompts[-1].endswith(f"{ASKED}{SURE}{SURE} So the answer is:")
    assert (played.budgets, played.trajectory.answer) == ([64, 64, 24], "?London?")
    assert played.trajectory.steps[-1].analysis == f"{SURE}{SURE}".strip()
    more = play(tokenizer, "flare", [*lines[:2], SURE, " x"], logprobs_of=sure, flare__max_tokens=2 * length + 1)
    assert more.trajectory.answer == "x"
    for nothing in ("", "\n", " ."):
        played = play(tokenizer, "flare", [SURE, nothing, " Shrewsbury"], logprobs_of=sure)
        assert played.prompts[-1].endswith(f"{ASKED}{SURE} So the answer is:")
        assert played.trajectory.answer == "Shrewsbury"
    assert play(tokenizer, "flare", ["", ""], logprobs_of=sure).trajectory.status == Status.NO_ANSWER


def test_a_stop_that_a_server_left_out_is_neither_sure_nor_unsure(tokenizer: Tokenizer) -> None:
    played = play(tokenizer, "flare", [SURE, ANSWER], logprobs_of=lambda ids: [-0.1] * (len(ids) - 1) + [math.nan])
    assert played.queries == [QUESTION.question]


def test_a_backend_without_logprobs_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"the baseline flare needs the log-probability of each sampled token"):
        play(tokenizer, "flare", [SURE], logprobs_of=lambda ids: None)

"""Self-Ask: which follow-up questions are searched for, and when it must answer."""

from __future__ import annotations

from playing import DARWIN, ORIGIN, QUESTION, play

from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Status, Step

ASKED = f"Question: {QUESTION.question}\nAre follow up questions needed here:"
WHO, WHERE = "Who wrote Origin then?", "Where was Charles Darwin born?"
LINES = [
    f" Yes.\nFollow up: {WHO}\nIntermediate answer:",
    f" Charles Darwin\nFollow up: {WHERE}\nIntermediate answer:",
    " Shrewsbury\nSo the final answer is: Shrewsbury.\n\nQuestion: Who",
]


def test_follow_up_questions_are_the_queries(tokenizer: Tokenizer) -> None:
    played = play(tokenizer, "self_ask", LINES)
    assert played.asked == [(WHO, 1), (WHERE, 1)]  # the question itself is not one
    assert played.trajectory.steps == (
        Step("Yes.", query=WHO, passages=(ORIGIN,)),
        Step("Charles Darwin", query=WHERE, passages=(DARWIN,)),
        Step("Shrewsbury", answer="Shrewsbury"),
    )
    first = f" Yes.\nFollow up: {WHO}\nIntermediate answer:"
    second = f" Charles Darwin\nFollow up: {WHERE}\nIntermediate answer:"
    assert played.prompts[0].endswith(f"So the final answer is: Nile\n\n{ASKED}")
    assert played.prompts[1].endswith(f"\n\n{ORIGIN.contents}\n{ASKED}{first}")
    assert played.prompts[2].endswith(f"\n\n{DARWIN.contents}\n{ASKED}{first}{second}")  # the last passages alone
    assert played.budgets == [128] * 3
    assert played.stops.stop_strings == ("Intermediate answer:", "\nQuestion:")


def test_what_a_server_leaves_out_or_writes_on_changes_nothing(tokenizer: Tokenizer) -> None:
    trimmed = [line.removesuffix("Intermediate answer:") for line in LINES]
    longer = [*(f"{line} of its own\nSo the final answer is: wrong" for line in LINES[:2]), LINES[2]]
    for lines in (trimmed, longer):
        played = play(tokenizer, "self_ask", lines)
        assert (played.queries, played.trajectory.answer) == ([WHO, WHERE], "Shrewsbury")


def test_no_follow_up_question_is_needed(tokenizer: Tokenizer) -> None:
    played = play(tokenizer, "self_ask", [" No.\nSo the final answer is: Shrewsbury"])
    assert (played.asked, played.trajectory.steps) == ([], (Step("No.", answer="Shrewsbury"),))


def test_who_asks_too_often_must_answer(tokenizer: Tokenizer) -> None:
    """A repeated question is searched for again, and counts."""
    played = play(tokenizer, "self_ask", [LINES[0], f" x\nFollow up: {WHO}", f" y\nFollow up: {WHO}", " z."],
                  self_ask__max_follow_ups=2)  # fmt: skip
    assert played.queries == [WHO, WHO]
    assert played.prompts[-1].endswith("Intermediate answer: y\nSo the final answer is:")
    assert played.budgets[-1] == 24 and played.trajectory.answer == "z"


def test_who_asks_nothing_must_answer(tokenizer: Tokenizer) -> None:
    for line, shown in ((" Yes.\nFollow up: \n", " Yes."), (" Well.", " Well."), ("", "")):
        played = play(tokenizer, "self_ask", [line, " Shrewsbury\nFollow up: x"])
        assert played.asked == [] and played.prompts[1].endswith(f"{ASKED}{shown}\nSo the final answer is:")
        assert played.trajectory.steps == (Step(shown.strip(), answer="Shrewsbury"),)
    nothing = play(tokenizer, "self_ask", ["", ""]).trajectory
    assert (nothing.status, nothing.steps) == (Status.NO_ANSWER, ())


def test_a_chat_model_goes_on_with_its_own_reply(tokenizer: Tokenizer) -> None:
    played = play(tokenizer, "self_ask", LINES, chat=True)
    opening = "<|im_start|>assistant\nAre follow up questions needed here:"
    assert played.prompts[0].count(opening) == 3 and played.prompts[0].endswith(opening)
    assert played.prompts[1].endswith(f"{opening} Yes.\nFollow up: {WHO}\nIntermediate answer:")
    assert f"<|im_start|>user\nDocuments:\n{ORIGIN.contents}\n" in played.prompts[1]

"""CoT, RAG + CoT and ITER-RETGEN: a whole chain of thought at a time."""

from __future__ import annotations

import pytest
from playing import DARWIN, GENESIS, ORIGIN, QUESTION, play

from r3rag_jax.baselines.prompting import line_stops, text_stops
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Status, Step

ASKED = f"Question: {QUESTION.question}\nReasoning:"
CHAIN = "The author is Charles Darwin."


def test_cot_thinks_and_answers_in_one_completion(tokenizer: Tokenizer) -> None:
    played = play(tokenizer, "cot", [f" {CHAIN} So the answer is: Shrewsbury.\nQuestion: Who"])
    assert played.trajectory.steps == (Step(CHAIN, answer="Shrewsbury"),)
    assert (played.asked, played.budgets, played.stops) == ([], [256], line_stops(tokenizer))
    examples, _, last = played.prompts[0].rpartition("\n\n")
    assert last == ASKED and examples.startswith("Question: Where was the engineer born")
    assert examples.count("So the answer is:") == 2 and "Tower in Paris" not in examples


def test_a_chain_that_does_not_answer_is_asked_to(tokenizer: Tokenizer) -> None:
    """One that its budget has cut off, one that stops, and none at all."""
    for chain, shown in ((f" {CHAIN}", f" {CHAIN}"), (f" {CHAIN}\n", f" {CHAIN}"), ("", ""), ("\n", "")):
        played = play(tokenizer, "cot", [chain, " Shrewsbury.\n"], cot__max_tokens=50, max_answer_tokens=13)
        assert played.prompts[1].endswith(f"{ASKED}{shown} So the answer is:")
        assert played.budgets == [50, 13] and played.trajectory.answer == "Shrewsbury"
        assert played.trajectory.steps[-1].analysis == shown.strip()
    nothing = play(tokenizer, "cot", ["", ""]).trajectory
    assert (nothing.status, nothing.steps, nothing.num_policy_tokens) == (Status.NO_ANSWER, (), 2)
    assert play(tokenizer, "cot", [" So the answer is: ."]).trajectory.status == Status.NO_ANSWER


def test_a_chat_model_may_think_in_several_lines(tokenizer: Tokenizer) -> None:
    played = play(tokenizer, "cot", [f"1. {CHAIN}\n2. Born.\nSo the answer is: Shrewsbury\nDone."], chat=True)
    assert played.trajectory.steps == (Step(f"1. {CHAIN}\n2. Born.", answer="Shrewsbury"),)
    assert played.stops == text_stops(tokenizer) and played.stops.stop_strings == ()
    assert played.prompts[0].endswith(f"\nQuestion: {QUESTION.question}<|im_end|>\n<|im_start|>assistant\n")
    assert "Documents:" not in played.prompts[0]
    forced = play(tokenizer, "cot", [CHAIN, " Shrewsbury"], chat=True)
    assert forced.prompts[1].endswith(f"<|im_start|>assistant\n{CHAIN} So the answer is:")


def test_rag_cot_thinks_over_what_the_question_finds(tokenizer: Tokenizer) -> None:
    lines = [f" {CHAIN} So the answer is: Shrewsbury."]
    played = play(tokenizer, "rag_cot", lines)
    assert played.asked == [(QUESTION.question, 16)]
    [search, answer] = played.trajectory.steps
    assert (search.analysis, search.query, search.passages) == ("", QUESTION.question, (ORIGIN, DARWIN))
    assert answer == Step(CHAIN, answer="Shrewsbury")
    both = f"{ORIGIN.contents}\n{DARWIN.contents}\n{ASKED}"
    assert played.prompts[0].endswith(f"\n\n{both}")
    assert played.prompts[0].startswith('"Eiffel Tower"\nTower in Paris')
    length = len(played.contexts[0].ids) + 256
    assert play(tokenizer, "rag_cot", lines, max_length=length).prompts == played.prompts
    shorter = play(tokenizer, "rag_cot", lines, max_length=length - 1)
    assert shorter.prompts[0].endswith(f"\n\n{ORIGIN.contents}\n{ASKED}")  # the last passage goes first
    assert play(tokenizer, "rag_cot", lines, rag_cot__top_k=1).asked == [(QUESTION.question, 1)]


def test_iter_retgen_searches_for_its_chains(tokenizer: Tokenizer) -> None:
    """Passages of earlier searches are not shown again, and the last chain answers, whatever the earlier ones say."""
    lines = [" Genesis. So the answer is: a band", f" {CHAIN}", " He was born there. So the answer is: Shrewsbury"]
    played = play(tokenizer, "iter_retgen", lines)
    first = "Genesis. So the answer is: a band"
    question = QUESTION.question
    assert played.asked == [(question, 1), (f"{question} {first}", 1), (f"{question} {CHAIN}", 1)]
    assert [step.analysis for step in played.trajectory.steps] == ["", first, CHAIN, "He was born there."]
    assert [step.passages for step in played.trajectory.steps] == [(ORIGIN,), (ORIGIN,), (ORIGIN,), ()]
    assert played.trajectory.answer == "Shrewsbury" and played.budgets == [256] * 3
    assert all(prompt.endswith(f"\n\n{ORIGIN.contents}\n{ASKED}") for prompt in played.prompts)
    wide = play(tokenizer, "iter_retgen", lines, top_k=3)
    assert [step.passages for step in wide.trajectory.steps][:2] == [(ORIGIN, DARWIN), (ORIGIN, DARWIN, GENESIS)]


def test_iter_retgen_asks_for_an_answer_after_its_last_chain_alone(tokenizer: Tokenizer) -> None:
    played = play(tokenizer, "iter_retgen", ["", f" {CHAIN}", " Shrewsbury"], iter_retgen__iterations=2)
    assert played.queries == [QUESTION.question] * 2  # an empty chain repeats the query
    assert played.prompts[-1].endswith(f"{ASKED} {CHAIN} So the answer is:")
    assert played.budgets == [256, 256, 24] and played.trajectory.answer == "Shrewsbury"
    once = play(tokenizer, "iter_retgen", [" So the answer is: x"], iter_retgen__iterations=1)
    assert (once.queries, once.trajectory.answer) == ([QUESTION.question], "x")


@pytest.mark.parametrize("name", ["cot", "rag_cot", "iter_retgen"])
def test_a_context_without_room_for_a_chain_ends_without_an_answer(name: str, tokenizer: Tokenizer) -> None:
    played = play(tokenizer, name, [], chat=True, max_length=700)
    assert (played.trajectory.status, played.prompts) == (Status.NO_ANSWER, [])

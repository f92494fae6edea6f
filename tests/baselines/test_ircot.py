"""IRCoT: which queries it asks, what its prompts show, and when its chain of thought ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from playing import DARWIN, ORIGIN, QUESTION, Played, play

from r3rag_jax.config import BaselinesConfig
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Context, Status, Step, Trajectory

MAX_ANSWER_TOKENS = BaselinesConfig().max_answer_tokens
MAX_SENTENCE_TOKENS = BaselinesConfig().ircot.sentence_tokens
MAX_SENTENCES = BaselinesConfig().ircot.max_sentences
FIRST, SECOND = "The author of Origin is Charles Darwin.", "Charles Darwin was born in Shrewsbury."


def think(
    tokenizer: Tokenizer, lines: Sequence[str], ends: str = "", **settings: Any
) -> tuple[Trajectory, list[str], Played, list[Context]]:
    """The trajectory of a model that writes these lines, its prompts, its searches and its contexts."""
    played = play(tokenizer, "ircot", [line + ends for line in lines], **settings)
    return played.trajectory, played.prompts, played, played.contexts


def test_each_sentence_is_a_query_until_the_answer(tokenizer: Tokenizer) -> None:
    lines = [f" {FIRST}", f" {SECOND}", " So the answer is: Shrewsbury."]
    trajectory, prompts, searches, contexts = think(tokenizer, lines)
    assert searches.asked == [(QUESTION.question, 1), (FIRST, 2), (SECOND, 3)]
    assert trajectory.steps == (
        Step("", query=QUESTION.question, passages=(ORIGIN,)),
        Step(FIRST, query=FIRST, passages=(DARWIN,)),
        Step(SECOND, query=SECOND, passages=()),
        Step("", answer="Shrewsbury"),
    )
    assert (trajectory.status, trajectory.answer) == (Status.ANSWERED, "Shrewsbury")
    assert trajectory.num_policy_tokens == sum(len(tokenizer.encode(line)) for line in lines)
    examples, _, last = prompts[1].rpartition("\n\n")
    assert last == f"{ORIGIN.contents}\n{DARWIN.contents}\nQuestion: {QUESTION.question}\nReasoning: {FIRST}"
    assert examples.startswith('"Eiffel Tower"\n') and examples.count("\nReasoning: ") == 2
    assert examples.endswith(" The Thames is 346 km long. So the answer is: Nile")
    assert [context.budget for context in contexts] == [MAX_SENTENCE_TOKENS] * 3
    assert [context.temperature for context in contexts] == [0.0] * 3


def test_a_chain_without_an_answer_is_asked_for_one(tokenizer: Tokenizer) -> None:
    """After so many sentences, and when the model ends its chain by itself."""
    thoughts = [f" Thought {number} of Darwin." for number in range(MAX_SENTENCES)]
    trajectory, prompts, searches, contexts = think(tokenizer, [*thoughts, " Shrewsbury\n"])
    assert len(searches.asked) == 1 + MAX_SENTENCES
    assert prompts[-1].endswith(f"Reasoning:{''.join(thoughts)} So the answer is:")
    assert [context.budget for context in contexts[-2:]] == [MAX_SENTENCE_TOKENS, MAX_ANSWER_TOKENS]
    assert trajectory.answer == "Shrewsbury"
    for nothing in ("", "\n", " ."):
        trajectory, prompts, searches, _ = think(tokenizer, [f" {FIRST}", nothing, " Shrewsbury"])
        assert len(searches.asked) == 2 and prompts[-1].endswith(f"{FIRST} So the answer is:")
        assert (trajectory.answer, len(trajectory.steps)) == ("Shrewsbury", 3)


def test_no_answer_is_none(tokenizer: Tokenizer) -> None:
    for lines in ([" So the answer is: ."], ["", "\n"]):
        trajectory, *_ = think(tokenizer, lines)
        assert (trajectory.status, trajectory.answer, len(trajectory.steps)) == (Status.NO_ANSWER, None, 1)


def test_a_server_that_leaves_the_full_stop_out_changes_nothing(tokenizer: Tokenizer) -> None:
    lines = [FIRST.rstrip("."), SECOND.rstrip("."), "So the answer is: Shrewsbury"]
    trajectory, prompts, searches, _ = think(tokenizer, lines, ends=tokenizer.decode([tokenizer.eos_id]))
    assert searches.queries == [QUESTION.question, FIRST, SECOND]
    assert prompts[-1].endswith(f"Reasoning: {FIRST} {SECOND}")
    assert trajectory.answer == "Shrewsbury"


def test_a_thought_before_the_answer_is_kept(tokenizer: Tokenizer) -> None:
    trajectory, *_ = think(tokenizer, [" He is of Shrewsbury, so the end. So the answer is: Shrewsbury"])
    assert trajectory.steps[-1] == Step("He is of Shrewsbury, so the end.", answer="Shrewsbury")


def test_a_chat_model_goes_on_with_its_own_reply(tokenizer: Tokenizer) -> None:
    _, prompts, _, _ = think(tokenizer, [FIRST, " So the answer is: Shrewsbury."], chat=True, max_length=4000)
    assert prompts[1].count("<|im_start|>user\n") == 3
    assert "<|im_start|>assistant\nThe Nile is some 6,650 km long. The Thames is 346 km long. So the" in prompts[1]
    assert prompts[1].endswith(f"Question: {QUESTION.question}<|im_end|>\n<|im_start|>assistant\n{FIRST}")
    assert prompts[0].endswith("<|im_start|>assistant\n")


def test_a_prompt_that_is_too_long_loses_its_oldest_passages(tokenizer: Tokenizer) -> None:
    lines = [f" {FIRST}", f" {SECOND}", " So the answer is: Shrewsbury."]
    _, prompts, _, contexts = think(tokenizer, lines)
    length = len(contexts[-1].ids) + MAX_SENTENCE_TOKENS
    _, same, _, _ = think(tokenizer, lines, max_length=length)
    assert same == prompts
    _, shorter, _, _ = think(tokenizer, lines, max_length=length - 1)
    assert shorter[:-1] == prompts[:-1] and shorter[-1] == prompts[-1].replace(f"{ORIGIN.contents}\n", "")
    _, cut, _, contexts = think(tokenizer, lines, max_length=300)
    assert len(contexts[-1].ids) == 300 - MAX_SENTENCE_TOKENS and cut[-1].endswith(f"{FIRST} {SECOND}")


def test_a_context_without_room_for_a_sentence_ends_without_an_answer(tokenizer: Tokenizer) -> None:
    trajectory, prompts, _, _ = think(tokenizer, [], chat=True, max_length=500)
    assert (trajectory.status, prompts) == (Status.NO_ANSWER, [])


def test_passages_have_a_budget(tokenizer: Tokenizer) -> None:
    lines = [f" {FIRST}", f" {SECOND} Genesis.", " So the answer is: x."]
    trajectory, *_ = think(tokenizer, lines, top_k=2, max_passages=2)
    assert [len(step.passages) for step in trajectory.steps] == [2, 0, 0, 0]

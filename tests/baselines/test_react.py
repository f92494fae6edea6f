"""ReAct: what its actions do, and what it observes."""

from __future__ import annotations

import pytest
from playing import DARWIN, ORIGIN, QUESTION, play

from r3rag_jax.baselines.react import as_observation
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Status, Step

ASKED = f"Question: {QUESTION.question}\nThought 1:"
SEARCH = " I need the author.\nAction 1: Search[Origin]"
SEEN = "Origin: Origin was written by Charles Darwin."


def test_actions_search_look_up_and_finish(tokenizer: Tokenizer) -> None:
    lines = [
        f"{SEARCH}\nObservation 1: made up",
        " It is Darwin.\nAction 2: search[Charles Darwin]",
        " The birthplace.\nAction 3: Lookup[born]",
        " There.\nAction 4: Finish[Shrewsbury]",
    ]
    played = play(tokenizer, "react", lines)
    assert played.asked == [("Origin", 1), ("Charles Darwin", 1)]
    found = "(Result 1 / 1) Darwin was born in Shrewsbury."
    assert played.trajectory.steps == (
        Step("I need the author.", query="Origin", passages=(ORIGIN,)),
        Step("It is Darwin.", query="Charles Darwin", passages=(DARWIN,)),
        Step(f"The birthplace.\nLookup[born]\n{found}\nThere.", answer="Shrewsbury"),
    )
    assert played.prompts[0].endswith(f"\n\n{ASKED}")
    assert played.prompts[1].endswith(f"{ASKED}{SEARCH}\nObservation 1: {SEEN}\nThought 2:")
    assert played.prompts[3].endswith(f"\nAction 3: Lookup[born]\nObservation 3: {found}\nThought 4:")
    assert played.budgets == [100] * 4
    assert played.stops.stop_strings == ("\nObservation", "\nQuestion:")


def test_a_thought_without_an_action_is_asked_for_one(tokenizer: Tokenizer) -> None:
    played = play(tokenizer, "react", [" I know it.\nSo", " Finish[Shrewsbury]\nThought 2:"])
    assert played.prompts[1].endswith(f"{ASKED} I know it.\nAction 1:")
    assert played.trajectory.steps == (Step("I know it.", answer="Shrewsbury"),)


def test_an_action_may_come_without_a_thought(tokenizer: Tokenizer) -> None:
    assert play(tokenizer, "react", [" Action 1: Finish[x]"]).trajectory.steps == (Step("", answer="x"),)


@pytest.mark.parametrize("action", ["Search[]", "Search[ ]", "Lookup[]", "Origin", "", "Finish", "Read[Origin]"])
def test_what_is_no_action_is_observed_as_invalid(tokenizer: Tokenizer, action: str) -> None:
    played = play(tokenizer, "react", [f" a\nAction 1: {action}", " b\nAction 2: Finish[x]"])
    assert played.prompts[1].endswith(f"Action 1: {action}\nObservation 1: Invalid action: {action}\nThought 2:")
    assert (played.asked, played.trajectory.answer) == ([], "x")


def test_lookups_go_from_sentence_to_sentence(tokenizer: Tokenizer) -> None:
    words = ["Darwin", "darwin", "Darwin", "Darwin", "cat"]
    lines = [" a\nAction 1: Search[Charles Darwin]"]
    lines += [f" a\nAction {number}: Lookup[{word}]" for number, word in enumerate(words, 2)]
    played = play(tokenizer, "react", [*lines, " a\nAction 7: Finish[x]"])
    observed = [prompt.rpartition("Observation")[2] for prompt in played.prompts[2:]]
    assert observed == [
        " 2: (Result 1 / 2) Charles Darwin was an English naturalist.\nThought 3:",
        " 3: (Result 1 / 2) Charles Darwin was an English naturalist.\nThought 4:",  # another word
        " 4: (Result 1 / 2) Charles Darwin was an English naturalist.\nThought 5:",
        " 5: (Result 2 / 2) Darwin was born in Shrewsbury.\nThought 6:",
        " 6: No more results.\nThought 7:",
    ]
    before = play(tokenizer, "react", [" a\nAction 1: Lookup[Darwin]", " a\nAction 2: Finish[x]"])
    assert before.prompts[1].endswith("Observation 1: No more results.\nThought 2:")


def test_it_ends_without_an_answer_after_so_many_actions(tokenizer: Tokenizer) -> None:
    """A repeated query shows the same passages again; the last action may still finish."""
    lines = [SEARCH, SEARCH.replace("1:", "2:")]
    played = play(tokenizer, "react", lines, react__max_steps=2)
    assert (played.trajectory.status, played.queries) == (Status.NO_ANSWER, ["Origin", "Origin"])
    assert [step.passages for step in played.trajectory.steps] == [(ORIGIN,), (ORIGIN,)]
    last = play(tokenizer, "react", [SEARCH, " b\nAction 2: Finish[x]"], react__max_steps=2)
    assert last.trajectory.answer == "x"
    none = play(tokenizer, "react", [" a\nAction 1: Finish[]"])
    assert none.trajectory.status == Status.NO_ANSWER and none.trajectory.answer is None
    assert none.trajectory.steps == (Step("a", is_well_formed=False),)
    lost = play(tokenizer, "react", [" a\nAction 1: Look", " b\nAction 2: Look"], react__max_steps=2).trajectory
    notes = "a\nLook\nInvalid action: Look\nb\nLook\nInvalid action: Look"
    assert (lost.status, lost.steps) == (Status.NO_ANSWER, (Step(notes, is_well_formed=False),))


def test_nothing_found_is_said(tokenizer: Tokenizer) -> None:
    played = play(tokenizer, "react", [" a\nAction 1: Search[xyz]", " b\nAction 2: Finish[x]"])
    assert played.prompts[1].endswith("Observation 1: Nothing was found.\nThought 2:")


def test_a_prompt_that_is_too_long_leaves_its_oldest_observations_empty(tokenizer: Tokenizer) -> None:
    lines = [SEARCH, " b\nAction 2: Search[Charles Darwin]", " c\nAction 3: Finish[x]"]
    played = play(tokenizer, "react", lines)
    length = len(played.contexts[2].ids) + 100
    assert play(tokenizer, "react", lines, max_length=length).prompts == played.prompts
    shorter = play(tokenizer, "react", lines, max_length=length - 1)
    assert shorter.prompts[2] == played.prompts[2].replace(SEEN, "")
    chat = play(tokenizer, "react", lines, chat=True)
    assert chat.prompts[2].endswith(played.prompts[2].rpartition("\nThought 1:")[2])
    assert chat.prompts[0].endswith("<|im_start|>assistant\nThought 1:")


def test_a_passage_is_observed_in_one_line() -> None:
    assert as_observation(ORIGIN.contents) == SEEN
    assert as_observation("no title") == "no title"

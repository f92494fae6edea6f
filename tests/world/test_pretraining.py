"""Documents of the base model's pretraining: what they say is in their passages, and no trajectory is among them."""

from __future__ import annotations

import random

import pytest

from r3rag_jax.text.protocols import TAGS
from r3rag_jax.types import Question
from r3rag_jax.world.encyclopedia import Hop, World
from r3rag_jax.world.pretraining import NUM_DOCUMENTS, SPLIT, documents, make_world

Parts = tuple[str, list[str]]  # what stands before the counted text, and the counted lines


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0)


@pytest.fixture(scope="module")
def questions(world: World) -> dict[str, Question]:
    return {q.question: q for q in world.questions(SPLIT, 2 * NUM_DOCUMENTS)}


@pytest.fixture(scope="module")
def read(world: World) -> list[Parts]:
    found = [document for seed in range(2) for document in documents(world, random.Random(seed), 9)]
    split = [("".join(t for t, counts in d if not counts), "".join(t for t, counts in d if counts)) for d in found]
    return [(context, said.splitlines()) for context, said in split]


def is_told(hop: Hop, context: str) -> bool:
    """The passage's title, and the value in its text."""
    pages = context.split('"')[1:]
    return any(title == hop.entity and hop.answer in text for title, text in zip(pages[::2], pages[1::2], strict=True))


def hops_of(question: Question) -> list[Hop]:
    return [Hop(**hop) for hop in question.metadata["decomposition"]]


def test_what_is_known_or_told_decides_what_is_missing(read: list[Parts], questions: dict[str, Question]) -> None:
    """Documents that open with a question: what follows are the facts told, then the answer or what is missing."""
    endings = {(known, told, end): 0 for known in (0, 1) for told in (0, 1) for end in ("Answer", "Missing")}
    for context, said in read:
        asked = [line for line in context.splitlines() if line.startswith("Question: ")]
        if not asked:
            continue
        question = questions[asked[0].removeprefix("Question: ")]
        hops = hops_of(question)
        known = [hop.fact() in context.split('"')[0] for hop in hops]  # before the passages
        told = [is_told(hop, context) for hop in hops]
        is_settled = [k or t for k, t in zip(known, told, strict=True)]
        facts = next((line for line in said if line.startswith("Facts: ")), "")
        assert [hop.fact() in facts for hop in hops] == [s and not k for s, k in zip(is_settled, known, strict=True)]
        if all(is_settled):
            end, expected = "Answer", question.golden_answers[0]
        else:
            end, expected = "Missing", f"{hops[is_settled.index(False)].need()}."
        assert said[1 if facts else 0] == f"{end}: {expected}"
        endings[any(known), any(told), end] += 1
    assert all(count > 2 for (known, told, end), count in endings.items() if known or told), endings


def test_explained_answers_rest_on_the_passages(read: list[Parts], questions: dict[str, Question]) -> None:
    found = 0
    for context, said in read:
        for at, line in enumerate(said):
            if line.startswith("Question: ") and said[at + 1].startswith("Facts: "):
                found += 1
                question = questions[line.removeprefix("Question: ")]
                assert all(is_told(hop, context) for hop in hops_of(question))
                assert said[at + 2] == f"Answer: {question.golden_answers[0]}"
    assert found > 10


def test_documents_hold_no_trajectory(read: list[Parts]) -> None:
    for context, said in read:
        text = "\n".join([context, *said])
        assert not any(tag in text for tag in TAGS)
        assert "I need" not in text and "problem analysis" not in text


def test_other_passages_are_mostly_of_similar_names(read: list[Parts]) -> None:
    """As a retriever brings them: what shares a word with none of the other titles was drawn at random."""
    similar = []
    for context, _ in read:
        pages = context.removeprefix("Question: ").split('"')[1::2]
        words = [set(title.split()) - {"The"} for title in pages]
        similar += [any(w & other for j, other in enumerate(words) if j != i) for i, w in enumerate(words)]
    assert 0.5 < sum(similar) / len(similar) < 0.95

"""What a search brings that its trajectory did not have."""

import pytest

from r3rag_jax.rewards.novelty import new_passages, new_searches, normalize_query
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

A, B, C = (Passage(id, f"of {id}") for id in "abc")


def of(*steps):
    return Trajectory(Question("q", "Who?", ("x",)), tuple(steps), Status.NO_ANSWER)


def search(query, *passages):
    return Step("", query=query, passages=passages)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Who wrote\n'Origin'?", "who wrote origin"),
        ("who_wrote origin", "who wrote origin"),
        ("\uff37\uff28\uff2f wrote Straße 7", "who wrote strasse 7"),
        ("谁写了《物种起源》\uff1f", "谁写了 物种起源"),
        ("?!", ""),
    ],
)
def test_normalize_query(text, expected):
    assert normalize_query(text) == expected


def test_new_passages():
    copy = Passage("d", A.contents)
    trajectory = of(search("x", A, B), search("y", B, C), Step("", answer="z"), search("w", A, copy))
    assert new_passages(trajectory) == [(A, B), (C,), (), ()]


def test_new_searches():
    first = of(search("x", A), search("X ?", B), search("y", A), search("z", A, C), search("w"))
    second = of(search("x"), search("x", B), Step("", is_well_formed=False))
    assert list(new_searches([first, second])) == [(0, 0, (A,)), (0, 3, (C,))]

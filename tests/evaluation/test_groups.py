"""Groups of questions: a type is never taken for a group of our own."""

from __future__ import annotations

import pytest
from attempts import attempt, question

from r3rag_jax.evaluation.groups import groups_of, type_group
from r3rag_jax.evaluation.summary import summarise

TYPES = ("all", "seen", "unseen", "all (type)", "all (type) (type)", "bridge", "All", "seen it")


def test_types_named_like_our_groups_are_told_apart() -> None:
    names = [type_group(question("1", "x", type=name)) for name in TYPES]
    assert names == [
        "all (type)", "seen (type)", "unseen (type)", "all (type) (type)", "all (type) (type) (type)",
        "bridge", "All", "seen it",
    ]  # fmt: skip
    assert type_group(question("1", "x")) is None and type_group(question("1", "x", type=None)) is None


@pytest.mark.parametrize(
    ("metadata", "groups"),
    [({}, []), ({"unseen": True}, ["unseen"]), ({"type": "seen", "unseen": False}, ["seen (type)", "seen"])],
)
def test_a_question_is_in_the_group_of_its_type_and_of_its_composition(
    metadata: dict[str, object], groups: list[str]
) -> None:
    assert groups_of(question("1", "x", **metadata)) == groups


def test_a_type_named_all_does_not_count_twice() -> None:
    asked = [question("1", "x", type="all"), question("2", "x", type="bridge"), question("3", "x", type="all")]
    given = [attempt(asked[0], "x"), attempt(asked[1], "y"), attempt(asked[2], "x")]
    groups = summarise("r3rag", given, {}).result["groups"]
    assert {name: (group["num"], group["em"]) for name, group in groups.items()} == {
        "all": (3, pytest.approx(200 / 3)), "all (type)": (2, 100.0), "bridge": (1, 0.0),
    }  # fmt: skip

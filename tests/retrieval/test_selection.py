"""Which of the hits a step shows."""

import pytest

from r3rag_jax.retrieval.base import Hit
from r3rag_jax.retrieval.selection import select_passages
from r3rag_jax.types import Passage

HITS = [Hit(Passage(id, id), 1.0) for id in "abacde"]


def test_repeated_query_brings_the_next_passages():
    # The released code took the top k, then dropped what was shown: the same query brought nothing.
    first = select_passages(HITS, (), 2)
    second = select_passages(HITS, [passage.id for passage in first], 2)
    assert [passage.id for passage in first + second] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("seen", "k", "max_passages", "expected"),
    [
        ((), 3, None, "abc"),  # the second "a" counts once
        ("b", 9, None, "acde"),
        ("abcde", 2, None, ""),
        ((), 0, None, ""),
        ("xy", 4, 3, "a"),
        ("xyz", 4, 2, ""),
    ],
)
def test_select_passages(seen, k, max_passages, expected):
    chosen = select_passages(HITS, seen, k, max_passages=max_passages)
    assert "".join(passage.id for passage in chosen) == expected


def test_select_passages_refuses_a_negative_k():
    with pytest.raises(ValueError, match="k must not be negative; got -1"):
        select_passages(HITS, (), -1)

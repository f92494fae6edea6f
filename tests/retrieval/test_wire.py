"""JSON of retrieval servers: what is sent and read, and that everything else is refused with what came."""

from __future__ import annotations

from typing import Any

import pytest

from r3rag_jax.retrieval.base import Hit
from r3rag_jax.retrieval.wire import FORMATS, WireError
from r3rag_jax.types import Passage

ANN, BO = {"id": "7", "contents": '"Ann"\nAnn sings.'}, {"id": 8, "contents": "Bo", "more": [1]}


def read_retrieve_reply(reply: Any, num_queries: int, k: int) -> list[list[Hit]]:
    return FORMATS["search_r1"].read(reply, num_queries, k)


def test_requests() -> None:
    sent = {name: one.request(("who?",) if one.max_queries == 1 else ("who?", "é"), 3) for name, one in FORMATS.items()}
    assert sent == {
        "native": {"queries": ["who?", "é"], "k": 3},
        "search_r1": {"queries": ["who?", "é"], "topk": 3, "return_scores": True},
        "r3rag": {"query": "who?"},
        "r3rag_batch": {"querys": ["who?", "é"]},
    }


def test_replies_of_each_format() -> None:
    ann, bo = Passage("7", '"Ann"\nAnn sings.'), Passage("8", "Bo")
    scored = [ANN | {"score": 0.5}, BO | {"score": -2}]
    assert FORMATS["native"].read({"results": [scored, []]}, 2, 3) == [[Hit(ann, 0.5), Hit(bo, -2.0)], []]
    ranked = [Hit(ann, 0.0), Hit(bo, -1.0)]
    assert FORMATS["r3rag"].read([ANN, BO | {"score": "of the corpus"}], 1, 3) == [ranked]
    assert FORMATS["r3rag"].read([ANN, BO], 1, 1) == [ranked[:1]]  # the server alone says how many come
    assert FORMATS["r3rag_batch"].read([[ANN, BO], [{"id": 9, "title": "Di", "text": "Dee."}]], 2, 2) == [
        ranked,
        [Hit(Passage("9", '"Di"\nDee.'), 0.0)],
    ]
    assert FORMATS["r3rag"].read([], 1, 3) == [[]] and FORMATS["r3rag_batch"].read([], 0, 3) == []


@pytest.mark.parametrize(
    ("name", "reply", "message"),
    [
        ("native", {"result": [[]]}, "expected a field 'results'; got the fields ['result']"),
        ("native", {"results": [[ANN]]}, "row 1, document 1: score must be a finite number; got None"),
        ("r3rag", {"detail": "no"}, 'row 1 must be a list; got {"detail": "no"}'),
        ("r3rag", [[ANN]], "row 1, document 1: must be an object; got [{"),
        ("r3rag_batch", {"result": []}, "the reply must be a list; got an object"),
        ("r3rag_batch", [[], []], "the reply must have a row for each of 1 queries; got 2"),
        ("r3rag_batch", [ANN], "row 1 must be a list; got {"),
    ],
)
def test_replies_that_each_format_refuses(name: str, reply: Any, message: str) -> None:
    with pytest.raises(WireError) as error:
        FORMATS[name].read(reply, 1, 3)
    assert message in str(error.value)


def test_documents_with_scores() -> None:
    reply = {"result": [[{"document": ANN, "score": 0.25}, {"document": BO, "score": 0}], []], "more": 1}
    ann, bo = Passage("7", '"Ann"\nAnn sings.'), Passage("8", "Bo")
    assert read_retrieve_reply(reply, 2, 5) == [[Hit(ann, 0.25), Hit(bo, 0.0)], []]
    assert read_retrieve_reply(reply, 2, 1) == [[Hit(ann, 0.25)], []]  # a server that ignores topk


def test_bare_documents_are_ranked_as_they_come() -> None:
    [hits] = read_retrieve_reply({"result": [[BO, ANN, {"document": BO}]]}, 1, 3)
    assert [(hit.passage.id, hit.score) for hit in hits] == [("8", 0.0), ("7", -1.0), ("8", -2.0)]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (None, "the reply must be an object; got null"),
        ([[]], "the reply must be an object; got a list"),
        ({}, "expected a field 'result'"),
        ({"result": None}, "result must be a list; got null"),
        ({"result": [[], []]}, "the reply must have a row for each of 1 queries; got 2"),
        ({"result": []}, "the reply must have a row for each of 1 queries; got 0"),
        ({"result": [None]}, "row 1 must be a list; got null"),
        ({"result": [{"id": "1"}]}, 'row 1 must be a list; got {"id": "1"}'),
        ({"result": [[None]]}, "row 1, document 1: must be an object; got null"),
        ({"result": [[ANN, {"id": "1"}]]}, "row 1, document 2: expected a field 'contents'"),
        ({"result": [[{"contents": "x"}]]}, "row 1, document 1: expected a field 'id'"),
        ({"result": [[{"id": "1", "contents": ""}]]}, "contents must not be blank"),
        ({"result": [[{"document": "Ann", "score": 1}]]}, 'document must be an object; got "Ann"'),
        ({"result": [[{"document": ANN, "score": "1"}]]}, "score must be a finite number; got '1'"),
        ({"result": [[{"document": ANN, "score": float("nan")}]]}, "score must be a finite number; got nan"),
        ({"result": [[{"document": ANN, "score": None}]]}, "score must be a finite number; got None"),
        ({"result": [[{"id": "1", "contents": "\ud800"}]]}, "must be Unicode text; got a lone surrogate"),
    ],
)
def test_other_replies_are_refused(reply: Any, message: str) -> None:
    with pytest.raises(WireError) as error:
        read_retrieve_reply(reply, 1, 3)
    assert message in str(error.value)

"""Search-R1's JSON: what is read, and that everything else is refused with what came."""

from __future__ import annotations

from typing import Any

import pytest

from r3rag_jax.retrieval.base import Hit
from r3rag_jax.retrieval.wire import WireError, read_retrieve_reply, retrieve_request
from r3rag_jax.types import Passage

ANN, BO = {"id": "7", "contents": '"Ann"\nAnn sings.'}, {"id": 8, "contents": "Bo", "more": [1]}


def test_request() -> None:
    assert retrieve_request(("who?", "é"), 3) == {"queries": ["who?", "é"], "topk": 3, "return_scores": True}


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
        ({"result": [[], []]}, "result must have a row for each of 1 queries; got 2"),
        ({"result": []}, "result must have a row for each of 1 queries; got 0"),
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

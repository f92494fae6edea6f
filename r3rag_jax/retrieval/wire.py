"""JSON formats of retrieval servers, parsed strictly.

Search-R1 (github.com/PeterGriffinJin/Search-R1), `POST /retrieve`:

    {"queries": ["…", …], "topk": 3, "return_scores": true}
    -> {"result": [[{"document": {"id": "…", "contents": "…"}, "score": 0.8}, …], …]}

Without `return_scores`, and on servers that ignore it, the documents stand in the rows without scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from r3rag_jax.data.fields import FieldError, get_field, kind_of, show
from r3rag_jax.data.questions import passage_from_dict
from r3rag_jax.retrieval.base import Hit


class WireError(ValueError):
    """A message breaks its format; the error says where, and what came."""


def retrieve_request(queries: Sequence[str], k: int) -> dict[str, Any]:
    """The body of Search-R1's request for `k` passages for each query."""
    return {"queries": list(queries), "topk": k, "return_scores": True}


def read_retrieve_reply(reply: Any, num_queries: int, k: int) -> list[list[Hit]]:
    """The hits of Search-R1's reply, at most `k` for each query, in the order that came.

    Documents without scores get 0, -1, -2, …: scores are comparable within a query only.

    Raises:
        WireError: the reply is not `num_queries` rows of documents with id and contents.
    """
    try:
        if not isinstance(reply, dict):
            raise FieldError(f"the reply must be an object; got {kind_of(reply)}")
        rows = get_field(reply, "result", list)
        if len(rows) != num_queries:
            raise FieldError(f"result must have a row for each of {num_queries} queries; got {len(rows)}")
        return [_read_row(row, number)[:k] for number, row in enumerate(rows, 1)]
    except FieldError as error:
        raise WireError(str(error)) from error


def _read_row(row: Any, number: int) -> list[Hit]:
    if not isinstance(row, list):
        raise FieldError(f"row {number} must be a list; got {show(row)}")
    hits = []
    for rank, item in enumerate(row):
        try:
            hits.append(_read_hit(item, rank))
        except FieldError as error:
            raise FieldError(f"row {number}, document {rank + 1}: {error}") from error
    return hits


def _read_hit(item: Any, rank: int) -> Hit:
    if not isinstance(item, dict):
        raise FieldError(f"must be an object; got {show(item)}")
    document: Mapping[str, Any] = item
    score: Any = -rank
    if "document" in item:
        document, score = get_field(item, "document", dict), item.get("score", -rank)
    if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
        raise FieldError(f"score must be a finite number; got {score!r}")
    passage = passage_from_dict(document)
    try:
        f"{passage.id}{passage.contents}".encode()
    except UnicodeEncodeError:
        raise FieldError("id and contents must be Unicode text; got a lone surrogate") from None
    return Hit(passage, float(score))

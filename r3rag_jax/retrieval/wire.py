"""JSON formats of retrieval servers: requests and replies as a client writes and reads them, and a server's rows.

`native`, this package's, `POST /v1/search`. The fingerprint is the retriever's: two replies with different ones come
from different indexes.

    {"queries": ["…", …], "k": 3}
    -> {"fingerprint": "…", "results": [[{"id": "…", "contents": "…", "score": 0.8}, …], …]}

`search_r1` (github.com/PeterGriffinJin/Search-R1), `POST /retrieve`:

    {"queries": ["…", …], "topk": 3, "return_scores": true}
    -> {"result": [[{"document": {"id": "…", "contents": "…"}, "score": 0.8}, …], …]}

Without `return_scores`, and on servers that ignore it, the documents stand in the rows without scores. `topk` null is
the server's own number.

`r3rag`, of R3-RAG's training and demo, and `r3rag_batch`, of its benchmark, both `POST /search`. The server alone says
how many documents come.

    {"query": "…"} -> [{"id": "…", "contents": "…", …}, …]
    {"querys": ["…", …]} -> [[{"id": "…", "contents": "…", …}, …], …]

Replies are parsed strictly. A document has `contents`, or `text` with or without `title`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from r3rag_jax.data.fields import FieldError, get_field, kind_of, show
from r3rag_jax.data.questions import passage_from_dict, passage_to_dict
from r3rag_jax.retrieval.base import Hit

MAX_QUERIES = 64  # of a request


class WireError(ValueError):
    """A message breaks its format; the error says where, and what came."""


@dataclasses.dataclass(frozen=True)
class WireFormat:
    """One format, as a client needs it."""

    title: str  # as errors name it
    path: str  # after the server's base URL
    max_queries: int  # of a request
    request: Callable[[Sequence[str], int], dict[str, Any]]  # (queries, k) -> the body
    rows: Callable[[Any], list[Any]]  # the reply -> a row of documents for each query; FieldError
    has_scores: bool = False  # whether documents hold their scores

    def read(self, reply: Any, num_queries: int, k: int) -> list[list[Hit]]:
        """The hits of a reply, at most `k` for each query, in the order that came.

        Documents of formats without scores get 0, -1, -2, …: scores are comparable within a query only.

        Raises:
            WireError: the reply is not `num_queries` rows of documents with id and contents.
        """
        try:
            rows = self.rows(reply)
            if len(rows) != num_queries:
                raise FieldError(f"the reply must have a row for each of {num_queries} queries; got {len(rows)}")
            return [self._read_row(row, number)[:k] for number, row in enumerate(rows, 1)]
        except FieldError as error:
            raise WireError(str(error)) from error

    def _read_row(self, row: Any, number: int) -> list[Hit]:
        if not isinstance(row, list):
            raise FieldError(f"row {number} must be a list; got {show(row)}")
        hits = []
        for rank, item in enumerate(row):
            try:
                hits.append(_read_hit(item, rank, self.has_scores))
            except FieldError as error:
                raise FieldError(f"row {number}, document {rank + 1}: {error}") from error
        return hits


# ---------------------------------------------------------------- requests and rows of each format


def native_request(queries: Sequence[str], k: int) -> dict[str, Any]:
    """The body of `/v1/search`."""
    return {"queries": list(queries), "k": k}


def search_r1_request(queries: Sequence[str], k: int) -> dict[str, Any]:
    """The body of Search-R1's `/retrieve`."""
    return {"queries": list(queries), "topk": k, "return_scores": True}


def r3rag_request(queries: Sequence[str], k: int) -> dict[str, Any]:
    """The body of R3-RAG's `/search` for its one query."""
    [query] = queries
    return {"query": query}


def r3rag_batch_request(queries: Sequence[str], k: int) -> dict[str, Any]:
    """The body of the `/search` of R3-RAG's benchmark."""
    return {"querys": list(queries)}


def _rows_in(name: str) -> Callable[[Any], list[Any]]:
    """Reads a reply that is an object with its rows in a field."""

    def rows(reply: Any) -> list[Any]:
        if not isinstance(reply, dict):
            raise FieldError(f"the reply must be an object; got {kind_of(reply)}")
        return get_field(reply, name, list)

    return rows


def _list_of_rows(reply: Any) -> list[Any]:
    if not isinstance(reply, list):
        raise FieldError(f"the reply must be a list; got {kind_of(reply)}")
    return reply


# `retrieval.endpoint.format` -> format.
FORMATS = {
    "native": WireFormat("this package's format", "/v1/search", MAX_QUERIES, native_request, _rows_in("results"), True),
    "search_r1": WireFormat("Search-R1's format", "/retrieve", MAX_QUERIES, search_r1_request, _rows_in("result")),
    "r3rag": WireFormat("R3-RAG's format", "/search", 1, r3rag_request, lambda reply: [reply]),
    "r3rag_batch": WireFormat(
        "the format of R3-RAG's benchmark", "/search", MAX_QUERIES, r3rag_batch_request, _list_of_rows
    ),
}


# ---------------------------------------------------------------- documents


def flat_row(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """Hits as `native` and both of R3-RAG's formats have them."""
    return [passage_to_dict(hit.passage) | {"score": hit.score} for hit in hits]


def search_r1_row(hits: Sequence[Hit], *, with_scores: bool) -> list[dict[str, Any]]:
    """Hits as Search-R1's format has them."""
    documents = [passage_to_dict(hit.passage) for hit in hits]
    if not with_scores:
        return list(documents)
    return [{"document": document, "score": hit.score} for document, hit in zip(documents, hits, strict=True)]


def _read_hit(item: Any, rank: int, has_scores: bool) -> Hit:
    if not isinstance(item, dict):
        raise FieldError(f"must be an object; got {show(item)}")
    document: Mapping[str, Any] = item
    score: Any = item.get("score") if has_scores else -rank
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

"""A teacher's trajectories with the passages that another retriever finds for their queries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from r3rag_jax.data.jsonl import read_rows, write_jsonl
from r3rag_jax.data.records import STOP, OnError
from r3rag_jax.data.trajectories import read_trajectories
from r3rag_jax.retrieval.base import Retriever, search_hits
from r3rag_jax.types import Passage

DEPTH = 4  # hits per query, as a multiple of the passages that a step shows


def refresh_retrieved(
    source: Path,
    target: Path,
    retriever: Retriever,
    corpus: Mapping[str, Passage],
    top_k: int,
    on_error: OnError = STOP,
) -> None:
    """Copy a file of trajectories, with `retrieved_ids` replaced by what the retriever finds for the queries.

    `passage_ids`, the passages that a step needs, remain, so that the cold start shows them in any case.

    Args:
        source: a teacher's trajectories, as `read_trajectories` reads them; `target`: where the copy is written.
        retriever: searches for the queries; `corpus`: passage id -> passage, all that it can find.
        top_k: passages of a step.

    Raises:
        UserError: as `read_trajectories`; what `on_error` leaves out is not copied.
        RetrievalError: the search failed.
    """
    kept = set(read_trajectories(source, corpus, top_k, on_error).lines)
    rows = [dict(row) for number, row in read_rows(source, OnError("skip", say=lambda _: None)) if number in kept]
    steps = [step for row in rows for step in row["steps"] if step.get("query") is not None]
    found = search_hits(retriever, [step["query"] for step in steps], DEPTH * top_k)
    for step, hits in zip(steps, found, strict=True):
        step["retrieved_ids"] = [hit.passage.id for hit in hits]
        step.pop("passages", None)
    write_jsonl(target, rows)

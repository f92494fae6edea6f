"""Which of the passages found are shown: those not shown before, filled up from deeper hits."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from r3rag_jax.retrieval.base import Hit


def select_passages(hits: Sequence[Hit], seen_ids: Collection[str], k: int) -> list[Hit]:
    """The first `k` hits, best first, that the trajectory has not seen.

    The released code drops repeated passages *after* taking the top k, so that a repeated query
    brings nothing; the caller searches k + len(seen_ids) deep, and there are always k.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1 passage; got {k}")
    return [hit for hit in hits if hit.passage.id not in seen_ids][:k]

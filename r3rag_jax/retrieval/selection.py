"""Which of the passages found a step shows."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from r3rag_jax.retrieval.base import Hit
from r3rag_jax.types import Passage


def select_passages(
    hits: Sequence[Hit],
    seen_ids: Collection[str],
    k: int,
    *,
    max_passages: int | None = None,
) -> tuple[Passage, ...]:
    """The best `k` passages that the trajectory has not shown yet, best first.

    Passages already shown are skipped and deeper hits take their ranks, so that a repeated query returns the next
    passages instead of none. For k passages to be found whenever the corpus has them, search for `k + len(seen_ids)`.

    Args:
        hits: of one query, best first; a passage that occurs twice counts once.
        seen_ids: ids of the passages that the trajectory has shown.
        k: passages per retrieval.
        max_passages: budget of the trajectory, in which the passages already shown are included; None = no budget.
    """
    if k < 0:
        raise ValueError(f"k must not be negative; got {k}")
    if max_passages is not None:
        k = min(k, max(0, max_passages - len(set(seen_ids))))
    taken = set(seen_ids)
    chosen: list[Passage] = []
    for hit in hits:
        if len(chosen) == k:
            break
        if hit.passage.id not in taken:
            taken.add(hit.passage.id)
            chosen.append(hit.passage)
    return tuple(chosen)

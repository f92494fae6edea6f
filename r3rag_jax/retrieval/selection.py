"""Passages: their fingerprint, and which of those found a step shows."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence

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

    Passages already shown are dropped first and the places filled from deeper hits, so that a
    repeated query brings the next passages instead of nothing. For k to be reached whenever the
    corpus allows it, search for `k + len(seen_ids)` hits.

    Args:
        hits: of one query, best first; a passage that occurs twice counts once.
        seen_ids: ids of the passages that the trajectory has shown.
        k: passages per retrieval.
        max_passages: budget of the trajectory, those already shown included; None = no budget.
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


def corpus_fingerprint(passages: Iterable[Passage]) -> str:
    """Hex sha256 over ids and contents, in order."""
    return digest(part for passage in passages for part in (passage.id, passage.contents))


def digest(parts: Iterable[str]) -> str:
    """Hex sha256 of strings, each preceded by its length: moving a boundary changes it."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode()
        sha.update(f"{len(data)}:".encode())
        sha.update(data)
    return sha.hexdigest()

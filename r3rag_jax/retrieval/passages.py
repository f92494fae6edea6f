"""Passages: their files, their fingerprint, and which of those found a step shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from r3rag_jax.errors import UserError
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


def write_passages(passages: Iterable[Passage], path: str | Path) -> None:
    """Write passages as FlashRAG JSONL, one {"id", "contents"} per line."""
    with open(path, "w", encoding="utf-8") as file:
        for passage in passages:
            line = {"id": passage.id, "contents": passage.contents}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_passages(path: str | Path) -> tuple[Passage, ...]:
    """Passages of a FlashRAG JSONL file, one {"id", "contents"} per line; blank lines are skipped.

    Raises:
        UserError: the file is missing, or a line is no such object; it names file and line.
    """
    passages = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    passages.append(_parse_passage(line, f"{path}:{number}"))
    except FileNotFoundError as error:
        raise UserError(
            f"passages are read from an existing JSONL file; {path} is missing"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"passages are UTF-8 text; {path}: {error}") from error
    return tuple(passages)


def corpus_fingerprint(passages: Iterable[Passage]) -> str:
    """Hex sha256 over ids and contents, in order."""
    return digest(part for passage in passages for part in (passage.id, passage.contents))


def _parse_passage(line: str, place: str) -> Passage:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: a line is one JSON object; got {line[:80]!r} ({error})"
        ) from error
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("contents"), str)
        or "id" not in record
    ):
        raise UserError(
            f'{place}: a passage is {{"id": ..., "contents": "..."}}; got {line[:80]!r}'
        )
    return Passage(str(record["id"]), record["contents"])


def digest(parts: Iterable[str]) -> str:
    """Hex sha256 of strings, each preceded by its length: moving a boundary changes it."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode()
        sha.update(f"{len(data)}:".encode())
        sha.update(data)
    return sha.hexdigest()

"""Fingerprints: SHA-256 digests of texts and passages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from r3rag_jax.types import Passage


def digest(texts: Iterable[str]) -> str:
    """Hex SHA-256 of texts, each preceded by its length in bytes: ("ab", "c") differs from ("a", "bc")."""
    sha = hashlib.sha256()
    for text in texts:
        data = text.encode()
        sha.update(f"{len(data)}:".encode())
        sha.update(data)
    return sha.hexdigest()


def corpus_fingerprint(passages: Iterable[Passage]) -> str:
    """Hex SHA-256 of ids and contents, in order."""

    def texts() -> Iterator[str]:
        for passage in passages:
            yield passage.id
            yield passage.contents

    return digest(texts())

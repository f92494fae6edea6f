"""What a retriever and a text encoder promise the rest of the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from r3rag_jax.types import Passage

TextKind = Literal["query", "passage"]


class RetrievalError(RuntimeError):
    """A search failed: never to be read as "nothing found"."""


@dataclasses.dataclass(frozen=True)
class Hit:
    """A passage with its score; higher is closer, comparable within one query only."""

    passage: Passage
    score: float


class Retriever(Protocol):
    """Whatever finds passages for queries."""

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """Up to `k` hits per query, best first; `[]` where nothing matches.

        Raises:
            ValueError: k is not positive.
            RetrievalError: the search could not be carried out.
        """
        ...


class Encoder(Protocol):
    """Whatever turns texts into vectors."""

    @property
    def dim(self) -> int:
        """Size D of the vectors, floats."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that the vectors depend on; an index is valid for one fingerprint."""
        ...

    @property
    def cosine_kind(self) -> TextKind:
        """How to encode passages whose cosine with a query is read as such, and does not only rank them."""
        ...

    def encode(self, texts: Sequence[str], *, kind: TextKind = "query") -> np.ndarray:
        """float32 [len(texts), D], each row of L2 norm 1, or 0 for a text without a known feature.

        `kind` is the side of the search that the texts are on; E5, for one, prefixes the two
        differently.
        """
        ...

"""The contracts of retrieval: what a retriever and a text encoder promise the rest of the package."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from r3rag_jax.errors import ServiceError
from r3rag_jax.types import Passage

TextKind = Literal["query", "passage"]


class OnProgress(Protocol):
    """Told of the progress of a build."""

    def __call__(self, count: int, total: int, stage: str = ..., /) -> None:
        """`count` passages are newly done, of `total`; `stage` names a stage after the first, each of which has all."""


@dataclasses.dataclass(frozen=True)
class GivenFiles:
    """Files that are used instead of being computed."""

    vectors: tuple[Path, ...] = ()  # float arrays [n, D] in numpy's format, in the order of the corpus
    index: Path | None = None  # a FAISS index


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What a build of an index is given besides configuration and passages."""

    on_progress: OnProgress | None = None
    say: Callable[[str], None] | None = None  # told what the index will take, and how good it has become
    given: GivenFiles = GivenFiles()  # only for kinds of index that hold vectors
    spread: Callable[[Encoder], Encoder] = lambda encoder: encoder  # makes an encoder one of all processes


class RetrievalError(ServiceError):
    """A search failed. It never means that nothing was found: that is an empty list of hits."""


@dataclasses.dataclass(frozen=True)
class Hit:
    """A passage with its score; higher is better, comparable within one query only."""

    passage: Passage
    score: float


class Retriever(Protocol):
    """Finds passages for queries. Callers use nothing but these two members."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that hits depend on: retrievers with equal fingerprints return equal hits."""
        ...

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """At most `k` hits for each query, best first; an empty list where nothing matches.

        May be called from several threads at once.

        Raises:
            ValueError: k is not positive.
            RetrievalError: the search could not be carried out.
        """
        ...


def search_hits(retriever: Retriever, queries: Sequence[str], k: int) -> list[list[Hit]]:
    """`retriever.search`, with the reply held to the contract: all searches of the package are made here.

    Raises:
        ValueError: k is not positive.
        RetrievalError: the search failed, or the reply is not a list of at most `k` hits for each query.
    """
    rows = retriever.search(queries, k)
    if not isinstance(rows, list) or len(rows) != len(queries):
        got = len(rows) if isinstance(rows, list) else type(rows).__name__
        raise failed_search(queries, f"a retriever returns a row for each of {len(queries)} queries; got {got}")
    for query, row in zip(queries, rows, strict=True):
        if not isinstance(row, list | tuple) or not all(isinstance(hit, Hit) for hit in row):
            raise failed_search([query], f"a row of a retriever holds hits; got {reprlib.repr(row)}")
        if len(row) > k:
            raise failed_search([query], f"a row of a retriever holds at most {k} hits; got {len(row)}")
    return rows


def failed_search(queries: Sequence[str], reason: object) -> RetrievalError:
    """The error of a failed search, which quotes the first queries."""
    shown = ", ".join(repr(query) for query in queries[:3])
    more = f" and {len(queries) - 3} more" if len(queries) > 3 else ""
    return RetrievalError(f"search failed for {shown}{more}: {reason}")


class Encoder(Protocol):
    """Turns texts into vectors."""

    @property
    def dim(self) -> int:
        """Size D of the vectors, in floats."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that the vectors depend on; an index is valid for one encoder fingerprint."""
        ...

    @property
    def cosine_kind(self) -> TextKind:
        """The `kind` to encode passages with when their cosine with a query is used as a number, not for ranking."""
        ...

    def encode(self, texts: Sequence[str], *, kind: TextKind = "query") -> np.ndarray:
        """float32 [len(texts), D], each row of L2 norm 1, or 0 for a text without a known feature.

        `kind` says whether the texts are queries or passages; E5, for example, has a prefix for each.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write what an index has to remember of its encoder into the directory of the index."""
        ...

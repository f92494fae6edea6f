"""Lexical retrieval: BM25 (Robertson and Zaragoza 2009) in Lucene's variant, with bm25s (arXiv 2407.03618)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Encoder, Hit, OnProgress, failed_search
from r3rag_jax.retrieval.fingerprint import digest
from r3rag_jax.retrieval.manifest import AGAIN, check_index
from r3rag_jax.retrieval.store import PassageStore
from r3rag_jax.types import Passage

FOLDER = "bm25"  # of the index's own files in an index directory
METHOD, K1, B = "lucene", 1.5, 0.75
WORD = r"(?u)\b\w\w+\b"  # in lower case; stop words are words, too, and nothing is stemmed
SETTINGS = json.dumps([METHOD, K1, B, WORD])
_CHUNK = 4096  # passages between two calls of `on_progress`


class BM25Retriever:
    """Ranks passages by score = sum of idf(word) * tf(word, passage) over the words of the query.

    idf = log(1 + (P - df + 1/2) / (df + 1/2)), tf = f / (f + k1 * (1 - b + b * length / mean length)), where a word
    occurs in df of P passages, and f times in this one. The index is memory-mapped.
    """

    def __init__(self, index: Any, passage_at: Callable[[int], Passage], corpus: str) -> None:
        """
        Args:
            index: `bm25s.BM25`.
            passage_at: position -> passage; equal scores are ranked by position.
            corpus: fingerprint of the passages.
        """
        self._index, self._passage_at = index, passage_at
        self._fingerprint = digest([corpus, "bm25", SETTINGS])

    @classmethod
    def open(
        cls, config: RetrievalConfig, index_dir: Path, encoder: Callable[[], Encoder] | None = None
    ) -> BM25Retriever:
        """Open an index directory.

        Raises:
            UserError: a file is missing or is not the one that was built, or the index has other parameters.
        """
        manifest = check_index(index_dir, "bm25")
        if (found := manifest.depends_on.get("settings")) != SETTINGS:
            raise UserError(f"the index in {index_dir} must have the settings {SETTINGS}; got {found}. {AGAIN}")
        index = _import_bm25s().BM25.load(index_dir / FOLDER, mmap=True, backend="numpy")
        return cls(index, PassageStore(index_dir).at, manifest.corpus)

    @staticmethod
    def write_files(
        config: RetrievalConfig, store: PassageStore, directory: Path, on_progress: OnProgress | None = None
    ) -> Mapping[str, str]:
        """Write the scores of all words in all passages."""
        texts = (passage.contents for passage in store.passages())
        tokenized = _tokenize(_counted(texts, len(store), on_progress), return_ids=True)
        if not tokenized.vocab:
            raise UserError("the passages must have words of two letters or digits at least; got none")
        index = _import_bm25s().BM25(K1, B, method=METHOD, backend="numpy")
        index.index(tokenized, show_progress=False)
        index.save(directory / FOLDER, show_progress=False)
        return {"settings": SETTINGS}

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the passages' fingerprint and the settings."""
        return self._fingerprint

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k passages of the highest scores above 0 for each query, best first, equal scores by position.

        Raises:
            ValueError: k is not positive.
            RetrievalError: the index could not be read; the message quotes the queries.
        """
        if k < 1:
            raise ValueError(f"k must be positive; got {k}")
        try:
            return [self._search(query, k) for query in queries]
        except Exception as error:  # no failure may look like an empty result
            raise failed_search(queries, f"{type(error).__name__}: {error}") from error

    def _search(self, query: str, k: int) -> list[Hit]:
        [words] = _tokenize([query], return_ids=False)
        scores_P = self._index.get_scores_from_ids(self._index.get_tokens_ids(words))
        positions = np.flatnonzero(scores_P > 0)
        if len(positions) > k:
            least = np.partition(scores_P[positions], -k)[-k]
            positions = positions[scores_P[positions] >= least]
        order = np.lexsort((positions, -scores_P[positions]))[:k]
        return [Hit(self._passage_at(p), float(scores_P[p])) for p in positions[order]]


def _tokenize(texts: Iterable[str], *, return_ids: bool) -> Any:
    """The words of each text, as lists of texts or, with a vocabulary, of ids."""
    return _import_bm25s().tokenize(
        texts, token_pattern=WORD, stopwords=None, stemmer=None, return_ids=return_ids, show_progress=False
    )


def _counted(texts: Iterable[str], total: int, on_progress: OnProgress | None) -> Iterator[str]:
    """The texts, with calls of `on_progress` on the way."""
    for number, text in enumerate(texts, 1):
        yield text
        if on_progress is not None and (number % _CHUNK == 0 or number == total):
            on_progress(number % _CHUNK or _CHUNK, total)


def _import_bm25s() -> Any:
    """bm25s, imported where it is first needed: other retrievers work without it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tqdm, which it imports if it is there, warns in some notebooks
            import bm25s
    except ImportError as error:
        raise UserError(f"retrieval.kind=bm25 needs the package bm25s: pip install bm25s ({error})") from error
    return bm25s

"""Lexical retrieval: BM25 (Robertson and Zaragoza 2009) in Lucene's variant, with bm25s (arXiv 2407.03618)."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import BuildOptions, Encoder, OnProgress
from r3rag_jax.retrieval.fingerprint import digest
from r3rag_jax.retrieval.manifest import AGAIN, Manifest, check_index
from r3rag_jax.retrieval.ranked import RankedRetriever, Ranking
from r3rag_jax.retrieval.store import PassageStore
from r3rag_jax.types import Passage

FOLDER = "bm25"  # of the index's own files in an index directory
METHOD, K1, B = "lucene", 1.5, 0.75
WORD = r"(?u)\b\w\w+\b"  # in lower case; stop words are words, too, and nothing is stemmed
SETTINGS = json.dumps([METHOD, K1, B, WORD])
BYTES_PER_WORD = 44  # of memory while bm25s sorts the scores of all words in all passages
_CHUNK = 4096  # passages between two calls of `on_progress`


class BM25Retriever(RankedRetriever):
    """Ranks passages by score = sum of idf(word) * tf(word, passage) over the words of the query.

    idf = log(1 + (P - df + 1/2) / (df + 1/2)), tf = f / (f + k1 * (1 - b + b * length / mean length)), where a word
    occurs in df of P passages, and f times in this one. The index is memory-mapped.
    """

    def __init__(
        self, index: Any, passage_at: Callable[[int], Passage], corpus: str, *, cached_queries: int = 0
    ) -> None:
        """
        Args:
            index: `bm25s.BM25`.
            passage_at: position -> passage; equal scores are ranked by position.
            corpus: fingerprint of the passages.
        """
        super().__init__(passage_at, cached_queries=cached_queries)
        self._index = index
        self._fingerprint = digest([corpus, "bm25", SETTINGS])

    @classmethod
    def open(
        cls, config: RetrievalConfig, index_dir: Path, encoder: Callable[[], Encoder] | None = None
    ) -> BM25Retriever:
        """Open an index directory.

        Raises:
            UserError: a file is missing or is not the one that was built, or the index has other parameters.
        """
        return cls.open_part(config, index_dir, check_index(index_dir, "bm25"))

    @classmethod
    def open_part(cls, config: RetrievalConfig, index_dir: Path, manifest: Manifest) -> BM25Retriever:
        """As `open`, of an index whose files were checked, and which may hold more."""
        if (found := manifest.depends_on.get("settings")) != SETTINGS:
            raise UserError(f"the index in {index_dir} must have the settings {SETTINGS}; got {found}. {AGAIN}")
        index = _import_bm25s().BM25.load(index_dir / FOLDER, mmap=True, backend="numpy")
        return cls(index, PassageStore(index_dir).at, manifest.corpus, cached_queries=config.cached_queries)

    @staticmethod
    def write_files(
        config: RetrievalConfig, store: PassageStore, directory: Path, options: BuildOptions
    ) -> Mapping[str, str]:
        """Write the scores of all words in all passages.

        Raises:
            UserError: no passage has a word, or bm25s would need more than `retrieval.memory_gb`.
        """
        words = _read_words((passage.contents for passage in store.passages()), len(store), options.on_progress)
        if not words.vocab:
            raise UserError("the passages must have words of two letters or digits at least; got none")
        if (needed := len(words.ids) * BYTES_PER_WORD / (1 << 30)) > config.memory_gb:
            raise UserError(
                f"BM25 over {len(words.ids)} words is built in about {needed:.1f} GiB; got "
                f"retrieval.memory_gb={config.memory_gb:g}. Raise it, or search a part of the corpus"
            )
        bm25s = _import_bm25s()
        index = bm25s.BM25(K1, B, method=METHOD, backend="numpy")
        index.index(bm25s.tokenization.Tokenized(words, words.vocab), show_progress=False)
        shutil.rmtree(directory / FOLDER, ignore_errors=True)
        index.save(directory / FOLDER, show_progress=False)
        return {"settings": SETTINGS}

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the passages' fingerprint and the settings."""
        return self._fingerprint

    def rank(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """The k passages of the highest scores above 0 for each query."""
        return [self._rank(query, k) for query in queries]

    def _rank(self, query: str, k: int) -> Ranking:
        [words] = _tokenize([query])
        scores_P = self._index.get_scores_from_ids(self._index.get_tokens_ids(words))
        positions = np.flatnonzero(scores_P > 0)
        if len(positions) > k:
            least = np.partition(scores_P[positions], -k)[-k]
            positions = positions[scores_P[positions] >= least]
        order = np.lexsort((positions, -scores_P[positions]))[:k]
        return positions[order], scores_P[positions[order]]


class _Words:
    """The words of passages as ids, 4 bytes each: iterates over the passages' lists of ids, as often as asked."""

    def __init__(self) -> None:
        self.vocab: dict[str, int] = {}
        self.ids = array("i")
        self._ends = array("q", [0])

    def add(self, words: Sequence[str]) -> None:
        """Append a passage."""
        self.ids.extend([self.vocab.setdefault(word, len(self.vocab)) for word in words])
        self._ends.append(len(self.ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[list[int]]:
        return (self.ids[start:stop].tolist() for start, stop in itertools.pairwise(self._ends))


def _read_words(texts: Iterable[str], total: int, on_progress: OnProgress | None) -> _Words:
    """The words of all texts, a chunk of texts at a time."""
    words = _Words()
    for chunk in _chunks(texts):
        for row in _tokenize(chunk):
            words.add(row)
        if on_progress is not None:
            on_progress(len(chunk), total)
    return words


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of `_CHUNK` texts."""
    rest = iter(texts)
    while chunk := list(itertools.islice(rest, _CHUNK)):
        yield chunk


def _tokenize(texts: Iterable[str]) -> list[list[str]]:
    """The words of each text."""
    return _import_bm25s().tokenize(
        texts, token_pattern=WORD, stopwords=None, stemmer=None, return_ids=False, show_progress=False
    )


def _import_bm25s() -> Any:
    """bm25s, imported where it is first needed: other retrievers work without it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tqdm, which it imports if it is there, warns in some notebooks
            import bm25s
    except ImportError as error:
        raise UserError(f"retrieval.kind=bm25 needs the package bm25s: pip install bm25s ({error})") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it asks for all that it does
    return bm25s

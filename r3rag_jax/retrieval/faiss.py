"""Exact dense retrieval with FAISS: inner products of vectors, deterministic to the last tie."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.questions import read_passages
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Encoder, Hit, RetrievalError, TextKind
from r3rag_jax.retrieval.encoders.bert import BertEncoder
from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.selection import corpus_fingerprint, digest
from r3rag_jax.types import Passage

INDEX_FILE = "index.faiss"
PASSAGES_FILE = "passages.jsonl"
HASH_FILE = "encoder.npz"  # a HashEncoder, whole
BERT_FILE = "encoder.json"  # where a BertEncoder's model is, and how it is used
FINGERPRINT_FILE = "fingerprint.json"
_CHUNK = 4096  # passages encoded at once: bounds the memory beside the index, paces `progress`
_SPARE_HITS = 8  # fetched beyond k, so that ties at the cut are settled by position
_TIE = 1e-5  # FAISS sums in another order for another batch size: scores this close may swap


class FaissIndex:
    """A Retriever over passages held in memory.

    Args:
        encoder: what turned, or now turns, the passages into vectors, and turns the queries.
        passages: the corpus, P passages of different ids; ties go to the one that comes first.
        index: a FAISS inner-product index over their vectors [P, D]; None encodes them now.
        num_threads: OpenMP threads of FAISS, a setting of the whole process; None leaves
            OMP_NUM_THREADS in charge.
        progress: called with the number of passages that were encoded since the last call.

    Raises:
        UserError: no passages, a repeated id, or FAISS is not installed.
    """

    def __init__(
        self,
        encoder: Encoder,
        passages: Sequence[Passage],
        *,
        index: Any = None,
        num_threads: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        faiss = _import_faiss()
        if num_threads is not None:
            faiss.omp_set_num_threads(num_threads)
        self.encoder = encoder
        self.passages = tuple(passages)
        if not self.passages:
            raise UserError("an index needs at least one passage; the corpus is empty")
        _check_unique_ids(self.passages)
        if index is None:
            index = faiss.IndexFlatIP(encoder.dim)
            for start in range(0, len(self.passages), _CHUNK):
                texts = [passage.contents for passage in self.passages[start : start + _CHUNK]]
                index.add(_encode(encoder, texts, "passage"))
                if progress is not None:
                    progress(len(texts))
        if (index.ntotal, index.d) != (len(self.passages), encoder.dim):
            raise UserError(
                "an index holds one vector of the encoder's size per passage, "
                f"{len(self.passages)} of {encoder.dim}; got {index.ntotal} of {index.d}"
            )
        self._index = index

    @classmethod
    def build(cls, passages: Iterable[Passage], *, dim: int = 1024, num_threads: int | None = None) -> FaissIndex:
        """Fit a HashEncoder of `dim` floats on the passages and index them: nothing to download."""
        passages = tuple(passages)
        if not passages:
            raise UserError("an index needs at least one passage; the corpus is empty")
        encoder = HashEncoder(dim).fit(passage.contents for passage in passages)
        return cls(encoder, passages, num_threads=num_threads)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over the corpus and the encoder: equal fingerprints give equal hits."""
        return digest([corpus_fingerprint(self.passages), self.encoder.fingerprint])

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """The min(k, P) nearest passages per query, best first, ties by position.

        `[]` for a query without a known feature. A query's hits do not depend on the other queries
        of the batch as long as its vector does not.

        Raises:
            ValueError: k is not positive.
            RetrievalError: the encoder or FAISS failed; the message holds the queries.
        """
        if k < 1:
            raise ValueError(f"k must be positive; got {k}")
        if not queries:
            return []
        try:
            vectors_QD = _encode(self.encoder, queries, "query")
            rows = np.flatnonzero(vectors_QD.any(axis=1))
            found = self._nearest(vectors_QD[rows], min(k, len(self.passages))) if len(rows) else ()
        except Exception as error:  # whatever broke must not look like an empty result
            shown = ", ".join(repr(query) for query in queries[:3])
            more = f" and {len(queries) - 3} more" if len(queries) > 3 else ""
            raise RetrievalError(f"search failed for {shown}{more}: {type(error).__name__}: {error}") from error
        hits: list[list[Hit]] = [[] for _ in queries]
        for row, (positions_K, scores_K) in zip(rows, found, strict=True):
            hits[row] = [Hit(self.passages[p], float(s)) for p, s in zip(positions_K, scores_K, strict=True)]
        return hits

    def _nearest(self, vectors_QD: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(positions, scores), both [k], per query; FAISS finds candidates, fixed sums rank."""
        num_candidates = min(k + _SPARE_HITS, len(self.passages))
        while True:
            scores_QC, positions_QC = self._index.search(vectors_QD, num_candidates)
            may_tie_at_cut = (scores_QC[:, -1] >= scores_QC[:, k - 1] - _TIE).any()
            if num_candidates == len(self.passages) or not may_tie_at_cut:
                break
            num_candidates = min(4 * num_candidates, len(self.passages))
        if (positions_QC < 0).any():
            raise RuntimeError(f"the index returned fewer than {num_candidates} candidates")
        found = []
        for vector_D, positions_C in zip(vectors_QD, positions_QC, strict=True):
            scores_C = np.einsum("cd,d->c", self._index.reconstruct_batch(positions_C), vector_D)
            order = np.lexsort((positions_C, -scores_C))[:k]
            found.append((positions_C[order], scores_C[order]))
        return found

    # ---- files ----

    def save(self, directory: str | Path) -> None:
        """Write the index to `directory`, whole or not at all; a former index there is replaced.

        Files: index.faiss, passages.jsonl (FlashRAG), fingerprint.json, and encoder.npz for a
        HashEncoder or encoder.json for a BertEncoder, which names the model's directory; any other
        encoder lives elsewhere and is given to `load`.
        """
        faiss = _import_faiss()
        directory = Path(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            faiss.write_index(self._index, str(new / INDEX_FILE))
            write_jsonl(new / PASSAGES_FILE, ({"id": p.id, "contents": p.contents} for p in self.passages))
            if isinstance(self.encoder, HashEncoder):
                self.encoder.save(new / HASH_FILE)
            elif isinstance(self.encoder, BertEncoder):
                self.encoder.save(new / BERT_FILE)
            fingerprint = {
                "corpus": corpus_fingerprint(self.passages),
                "encoder": self.encoder.fingerprint,
                "index": _file_digest(new / INDEX_FILE),
                "num_passages": len(self.passages),
                "dim": self.encoder.dim,
            }
            (new / FINGERPRINT_FILE).write_text(json.dumps(fingerprint, indent=1) + "\n")
            _replace_directory(new, directory, Path(scratch) / "old")

    @classmethod
    def load(
        cls,
        directory: str | Path,
        encoder: Encoder | None = None,
        *,
        num_threads: int | None = None,
    ) -> FaissIndex:
        """Read what `save` wrote, after checking every file against fingerprint.json.

        Args:
            directory: the saved index.
            encoder: the one that the index was built with; None reads encoder.json or encoder.npz.

        Raises:
            UserError: a file is missing, corrupt, or not what was saved; the message names it.
        """
        faiss = _import_faiss()
        directory = Path(directory)
        expected = _read_fingerprint(directory / FINGERPRINT_FILE)
        passages = read_passages(directory / PASSAGES_FILE)
        _check(directory / PASSAGES_FILE, "corpus", expected, corpus_fingerprint(passages))
        is_bert = (directory / BERT_FILE).is_file()
        encoder_path = directory / (BERT_FILE if is_bert else HASH_FILE)
        if encoder is None:
            encoder = (BertEncoder if is_bert else HashEncoder).load(encoder_path)
        _check(encoder_path, "encoder", expected, encoder.fingerprint)
        index_path = directory / INDEX_FILE
        if not index_path.is_file():
            raise UserError(f"an index directory holds {INDEX_FILE}; {index_path} is missing")
        _check(index_path, "index", expected, _file_digest(index_path))
        return cls(encoder, passages, index=faiss.read_index(str(index_path)), num_threads=num_threads)


def _import_faiss() -> Any:
    """FAISS, imported where it is first needed: the package works without it until then."""
    try:
        with warnings.catch_warnings():
            # Its SWIG wrappers warn about their own types on Python 3.12.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            import faiss
    except ImportError as error:
        raise UserError(f"a FAISS index needs the package faiss-cpu: pip install faiss-cpu ({error})") from error
    return faiss


def _encode(encoder: Encoder, texts: Sequence[str], kind: TextKind) -> np.ndarray:
    """float32 [N, D], C-contiguous as FAISS wants it, checked to be finite and of that shape."""
    vectors_ND = np.ascontiguousarray(encoder.encode(texts, kind=kind), np.float32)
    if vectors_ND.shape != (len(texts), encoder.dim):
        raise ValueError(f"an encoder returns {(len(texts), encoder.dim)} floats; got {vectors_ND.shape}")
    if not np.isfinite(vectors_ND).all():
        bad = int(np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))[0])
        raise ValueError(f"an encoder returns finite vectors; got NaN or infinity for {texts[bad]!r}")
    return vectors_ND


def _check_unique_ids(passages: Sequence[Passage]) -> None:
    seen: set[str] = set()
    for passage in passages:
        if passage.id in seen:
            raise UserError(f"passage ids must be unique; {passage.id!r} occurs twice")
        seen.add(passage.id)


def _read_fingerprint(path: Path) -> dict[str, Any]:
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"an index directory holds {path.name}; {path} is missing") from error
    except ValueError as error:
        raise UserError(f"{path} must be a JSON object; {error}") from error
    if not isinstance(expected, dict):
        raise UserError(f"{path} must be a JSON object; got {type(expected).__name__}")
    return expected


def _check(path: Path, part: str, expected: dict[str, Any], found: str) -> None:
    if expected.get(part) != found:
        raise UserError(
            f"{path} must be the {part} that the index was saved with "
            f"(fingerprint {expected.get(part)}); got {found}. Build the index again."
        )


def _replace_directory(new: Path, directory: Path, old: Path) -> None:
    """Rename `new` to `directory`; what was there moves to `old`, and comes back on failure.

    Two renames, because a directory cannot be renamed onto one that is not empty.
    """
    has_old = directory.exists()
    if has_old:
        os.rename(directory, old)
    try:
        os.rename(new, directory)
    except OSError:
        if has_old:
            os.rename(old, directory)
        raise


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

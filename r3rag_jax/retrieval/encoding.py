"""Writes the vectors of an index: encodes the passages, or copies vectors that were computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.arrays import open_array
from r3rag_jax.retrieval.base import Encoder, OnProgress, TextKind
from r3rag_jax.retrieval.builder import resume_stage
from r3rag_jax.retrieval.vectors import PATTERN, VectorShards, shard_name, write_shard
from r3rag_jax.types import Passage

CHUNK = 4096  # passages encoded at once: bounds the memory beside a shard, paces `on_progress`
MAX_SHARDS = 256  # a file, and an open file descriptor, each
NORM_TOLERANCE = 0.01  # by which the norm of a given vector may differ from 1: float16 and bfloat16 round
NUM_SPOT_CHECKS = 8  # given vectors that are compared with the encoder's
# Of each of them. MiniLM with E5's prefix has 0.982 to 0.997, and in bfloat16 0.99998.
MIN_COSINE = 0.998


def shard_rows(num_passages: int) -> int:
    """Rows of a shard: what is lost at most when a build is killed."""
    return CHUNK * max(1, -(-num_passages // (MAX_SHARDS * CHUNK)))


def encode_passages(
    encoder: Encoder,
    passage_at: Callable[[int], Passage],
    num_passages: int,
    directory: Path,
    dtype: str,
    on_progress: OnProgress | None = None,
) -> VectorShards:
    """Write a vector for each passage; finished shards of an earlier process are kept.

    Holds one shard and CHUNK passages in memory.

    Args:
        dtype: "float16" or "float32".
    """
    rows = shard_rows(num_passages)
    facts = {"encoder": encoder.fingerprint, "dtype": dtype, "rows": rows, "chunk": CHUNK}
    resume_stage(directory, "vectors", facts, PATTERN)
    for number, start in enumerate(range(0, num_passages, rows)):
        stop = min(start + rows, num_passages)
        if (directory / shard_name(number)).exists():
            report(on_progress, stop - start, num_passages)
            continue
        shard_ND = np.empty((stop - start, encoder.dim), dtype)
        for first in range(start, stop, CHUNK):
            last = min(first + CHUNK, stop)
            texts = [passage_at(p).contents for p in range(first, last)]
            shard_ND[first - start : last - start] = encode(encoder, texts, "passage")
            report(on_progress, last - first, num_passages)
        write_shard(directory, number, shard_ND)
    return VectorShards.open(directory)


def copy_vectors(
    files: Sequence[Path],
    encoder: Encoder,
    passage_at: Callable[[int], Passage],
    num_passages: int,
    directory: Path,
    dtype: str,
    on_progress: OnProgress | None = None,
) -> VectorShards:
    """Write vectors that were computed elsewhere: one row per passage, in the order of the files and of the corpus.

    Raises:
        UserError: a file is no array of float vectors of norm 1, their number or size is not the passages' or the
            encoder's, or they are not what the encoder makes of the passages.
    """
    arrays = [_load(path) for path in files]
    given = sum(len(array) for array in arrays), {array.shape[1] for array in arrays}
    if given != (num_passages, {encoder.dim}):
        raise UserError(
            f"--vectors must hold one vector of the encoder's size per passage, {num_passages} of {encoder.dim}; "
            f"got {given[0]} of {', '.join(map(str, sorted(given[1])))}"
        )
    rows = shard_rows(num_passages)
    stamps = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    resume_stage(directory, "vectors", {"files": stamps, "dtype": dtype, "rows": rows}, PATTERN)
    starts = np.cumsum([0, *map(len, arrays)])
    for number, start in enumerate(range(0, num_passages, rows)):
        stop = min(start + rows, num_passages)
        if not (directory / shard_name(number)).exists():
            parts = [
                _checked(array[max(start - first, 0) : max(stop - first, 0)], path, max(start - first, 0))
                for array, path, first in zip(arrays, files, starts[:-1].tolist(), strict=True)
            ]
            write_shard(directory, number, np.concatenate(parts).astype(dtype, copy=False))
        report(on_progress, stop - start, num_passages)
    vectors = VectorShards.open(directory)
    check_encoder(encoder, passage_at, vectors.take, num_passages, "--vectors")
    return vectors


def check_encoder(
    encoder: Encoder,
    passage_at: Callable[[int], Passage],
    take: Callable[[np.ndarray], np.ndarray],
    num_passages: int,
    what: str,
) -> None:
    """Compare a few given vectors with those of the encoder.

    Args:
        take: positions [N] -> the given vectors, float32 [N, D].

    Raises:
        UserError: a cosine is below MIN_COSINE, e.g. since the encoder, its pooling or its prefixes are others.
    """
    positions = spot_checks(num_passages)
    ours_ND = encode_at(encoder, passage_at, positions)
    given_ND = take(positions)
    cosines = np.einsum("nd,nd->n", ours_ND, given_ND) / np.maximum(np.linalg.norm(given_ND, axis=1), 1e-12)
    worst = int(np.argmin(cosines))
    if not cosines[worst] >= MIN_COSINE and ours_ND[worst].any():
        raise UserError(
            f"{what} must hold what the encoder makes of the passages, each of cosine {MIN_COSINE} at least; got "
            f"{cosines[worst]:.3f} for passage {positions[worst] + 1} of the corpus. Another model, "
            "retrieval.encoder.pooling or passage_prefix, or another order of passages, has made them"
        )


def spot_checks(num_passages: int) -> np.ndarray:
    """A few positions, evenly spaced."""
    return np.unique(np.linspace(0, num_passages - 1, NUM_SPOT_CHECKS).astype(np.int64))


def encode_at(encoder: Encoder, passage_at: Callable[[int], Passage], positions: np.ndarray) -> np.ndarray:
    """The encoder's vectors of the passages at positions, float32 [N, D]."""
    return encode(encoder, [passage_at(p).contents for p in positions.tolist()], "passage")


def encode(encoder: Encoder, texts: Sequence[str], kind: TextKind) -> np.ndarray:
    """float32 [N, D], C-contiguous as FAISS requires, checked to be finite and of that shape."""
    vectors_ND = np.ascontiguousarray(encoder.encode(texts, kind=kind), np.float32)
    if vectors_ND.shape != (len(texts), encoder.dim):
        raise ValueError(f"an encoder returns {(len(texts), encoder.dim)} floats; got {vectors_ND.shape}")
    if not np.isfinite(vectors_ND).all():
        bad = int(np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))[0])
        raise ValueError(f"an encoder returns finite vectors; got NaN or infinity for {texts[bad]!r}")
    return vectors_ND


def report(on_progress: OnProgress | None, count: int, total: int) -> None:
    """Tell of passages that are done."""
    if on_progress is not None:
        on_progress(count, total)


def _load(path: Path) -> np.ndarray:
    """An array of vectors, memory-mapped."""
    try:
        vectors_ND = open_array(path)
    except OSError as error:
        raise UserError(f"{path} must be an array in numpy's format: {error}") from error
    if vectors_ND.ndim != 2 or vectors_ND.dtype.kind != "f":
        raise UserError(f"{path} must be floats [n, D]; got {vectors_ND.dtype} {list(vectors_ND.shape)}")
    return vectors_ND


def _checked(rows_ND: np.ndarray, path: Path, first: int) -> np.ndarray:
    """The rows, of which row `first` of the file is the first, after their norms were checked."""
    rows_ND = np.asarray(rows_ND, np.float32)
    norms_N = np.sqrt(np.einsum("nd,nd->n", rows_ND, rows_ND))
    bad = np.flatnonzero(~(np.abs(norms_N - 1) <= NORM_TOLERANCE) & (norms_N != 0))
    if len(bad):
        raise UserError(
            f"{path}: the vectors of an index must have norm 1; row {first + bad[0] + 1} has {norms_N[bad[0]]:.4g}"
        )
    return rows_ND

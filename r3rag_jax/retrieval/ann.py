"""Approximate search with FAISS: builds and opens the files `index-00000.faiss`, … of an index directory.

hnsw    graphs over vectors of 8 bits, a file for each SEGMENT passages. A segment is built by one thread, so that the
        graph does not depend on the machine, and several at once where memory allows; none is rebuilt after a kill.
ivfpq   inverted lists of product-quantized vectors. The quantizers are trained on a sample; segments are filled one
        after another, kept when a build is killed, and merged into one file.

Both only find candidates: their exact inner products decide the ranks (`faiss.py`).
"""

from __future__ import annotations

import functools
import os
import struct
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import OnProgress
from r3rag_jax.retrieval.builder import resume_stage
from r3rag_jax.retrieval.manifest import AGAIN
from r3rag_jax.retrieval.planner import SEGMENT, FaissPlan, hnsw_segment_bytes
from r3rag_jax.retrieval.vectors import VectorShards
from r3rag_jax.run.files import SUFFIX

PATTERN = "index-*.faiss"
_ADD = 8192  # vectors added at once
_NUM_SCALES = 65_536  # vectors of a segment from which the 8-bit scales are taken
_FEW = 4  # queries
_GIB = 1 << 30
_CODE_BYTES = {b"IHNs": 1, b"IHNf": 4}  # of a float, by FAISS's name of a graph with vectors of 8 bits or whole ones
_READERS, _BLOCK = 4, 4 << 20  # threads that read ahead, and bytes that one reads at once


def build_hnsw(
    vectors: VectorShards,
    directory: Path,
    plan: FaissPlan,
    memory_gb: float,
    on_progress: OnProgress | None = None,
) -> None:
    """Write a graph for each segment, as many at once as there are CPUs and memory for."""
    faiss = import_faiss()
    resume_stage(directory, "hnsw", {**plan.build_facts(), "segment": SEGMENT, "faiss": faiss.__version__}, PATTERN)
    num_vectors, dim = vectors.shape
    lock, stopped = threading.Lock(), threading.Event()  # the lock is that of the progress bar

    def build(number: int) -> None:
        start, stop = number * SEGMENT, min((number + 1) * SEGMENT, num_vectors)
        path = directory / file_name(number)
        if path.exists():
            report(stop - start)
            return
        faiss.omp_set_num_threads(1)  # of this thread: links depend on the order in which vectors are added
        index = faiss.index_factory(dim, f"HNSW{plan.hnsw_links},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = plan.hnsw_build_ef
        index.train(vectors.take(_spread(start, stop, _NUM_SCALES)))
        for _, rows_ND in vectors.blocks(_ADD, start, stop):
            if stopped.is_set():
                return
            index.add(np.ascontiguousarray(rows_ND, np.float32))
            report(len(rows_ND))
        _write(index, path)

    def report(count: int) -> None:
        if on_progress is not None:
            with lock:
                on_progress(count, num_vectors, "graph")

    workers = int(max(1, min(memory_gb * _GIB // hnsw_segment_bytes(plan, dim), os.cpu_count() or 1)))
    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(build, range(-(-num_vectors // SEGMENT))))
        except BaseException:  # a full disk, or Ctrl-C: do not wait until the other graphs are done
            stopped.set()
            raise


def build_ivfpq(
    vectors: VectorShards,
    directory: Path,
    plan: FaissPlan,
    on_progress: OnProgress | None = None,
) -> None:
    """Train the quantizers, fill the lists, a segment of passages after the other, and merge them."""
    faiss = import_faiss()
    resume_stage(directory, "ivfpq", {**plan.build_facts(), "segment": SEGMENT, "faiss": faiss.__version__}, "*.faiss")
    num_vectors, dim = vectors.shape
    trained = directory / "trained.faiss"
    if not trained.exists():
        kind = f"IVF{plan.ivf_lists},PQ{plan.pq_bytes}"
        index = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
        index.do_polysemous_training = False  # for a filter that is not used here; it takes minutes
        index.pq.cp.niter, index.pq.cp.max_points_per_centroid = 10, 64  # FAISS's 25 and 256 take 10 times as long
        index.train(vectors.take(_spread(0, num_vectors, plan.ivf_train_rows)))
        _write(index, trained)
    segments = range(-(-num_vectors // SEGMENT))
    for number in segments:
        start, stop = number * SEGMENT, min((number + 1) * SEGMENT, num_vectors)
        path = directory / f"lists-{number:05d}.faiss"
        index = None if path.exists() else faiss.read_index(str(trained))
        for _, rows_ND in vectors.blocks(8 * _ADD, start, stop):
            if index is not None:
                index.add(np.ascontiguousarray(rows_ND, np.float32))
            if on_progress is not None:
                on_progress(len(rows_ND), num_vectors, "lists")
        if index is not None:
            _write(index, path)
            del index
    merged = faiss.read_index(str(directory / "lists-00000.faiss"))
    for number in segments[1:]:
        merged.merge_from(faiss.read_index(str(directory / f"lists-{number:05d}.faiss")), number * SEGMENT)
    _write(merged, directory / file_name(0))
    for path in (trained, *directory.glob("lists-*.faiss")):
        path.unlink()


class FaissIndexes:
    """FAISS indexes over consecutive passages, memory-mapped; `search` merges what they find."""

    def __init__(self, indexes: Sequence[Any]) -> None:
        self._indexes = list(indexes)
        self._starts = np.cumsum([0, *(index.ntotal for index in self._indexes)])
        self.ntotal, self.d = int(self._starts[-1]), int(self._indexes[0].d)

    @classmethod
    def open(cls, directory: Path, *, search_ef: int = 0, probes: int = 0) -> FaissIndexes:
        """Memory-map the files of an index directory.

        Args:
            search_ef: candidates of an HNSW search; probes: lists that an IVF search reads; 0: as the file says.

        Raises:
            UserError: there is no file, or FAISS cannot read it.
        """
        paths = sorted(directory.glob(PATTERN))
        if not paths:
            raise UserError(f"an index directory holds {file_name(0)}; {directory / file_name(0)} is missing. {AGAIN}")
        return cls([open_file(path, search_ef=search_ef, probes=probes) for path in paths])

    def search(self, vectors_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores, positions), both [Q, k], best first; position -1 where fewer were found."""
        # FAISS computes the queries of a large batch in parallel. A few queries are searched by one thread a segment:
        # they would wait for FAISS's other threads, which do little for them, wherever the CPUs are busy.
        if len(vectors_QD) <= _FEW:
            found = list(_pool().map(lambda index: index.search(vectors_QD, k), self._indexes))
        else:
            found = [index.search(vectors_QD, k) for index in self._indexes]
        return merge(found, self._starts[:-1], k)

    def reconstruct_batch(self, positions: np.ndarray) -> np.ndarray:
        """The vectors at positions, float32 [N, D], where the files hold them."""
        out_ND = np.empty((len(positions), self.d), np.float32)
        segments = np.searchsorted(self._starts, positions, "right") - 1
        for number in np.unique(segments):
            rows = np.flatnonzero(segments == number)
            out_ND[rows] = self._indexes[number].reconstruct_batch(positions[rows] - self._starts[number])
        return out_ND


def merge(
    found: Sequence[tuple[np.ndarray, np.ndarray]], starts: Sequence[int] | np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several searches, each (scores, positions) [Q, any] of passages from `starts[i]` on."""
    scores_QN = np.concatenate([scores for scores, _ in found], axis=1)
    positions_QN = np.concatenate(
        [np.where(part >= 0, part + start, -1) for (_, part), start in zip(found, starts, strict=True)], axis=1
    )
    order = np.argsort(np.where(positions_QN >= 0, -scores_QN, np.inf), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_QN, order, axis=1), np.take_along_axis(positions_QN, order, axis=1)


def open_file(path: Path, *, search_ef: int = 0, probes: int = 0) -> Any:
    """A FAISS index of any kind, memory-mapped where its kind can be.

    Raises:
        UserError: FAISS cannot read it.
    """
    faiss = import_faiss()
    try:
        _read_links(path)
        # Inverted lists are mapped by another flag than flat codes and graphs.
        flags = faiss.IO_FLAG_MMAP_IFC if not _is_ivf(path) else faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
        index = faiss.read_index(str(path), flags)
    except (RuntimeError, struct.error) as error:
        raise UserError(f"{path} must be a FAISS index: {error}. {AGAIN}") from error
    if hasattr(index, "hnsw") and search_ef:
        index.hnsw.efSearch = search_ef
    if hasattr(index, "nprobe") and probes:
        index.nprobe = probes
    return index


def file_name(number: int) -> str:
    """The name of a segment's file."""
    return f"index-{number:05d}.faiss"


@functools.cache
def import_faiss() -> Any:
    """FAISS, imported where it is first needed: other retrievers work without it."""
    try:
        with warnings.catch_warnings():
            # Its SWIG wrappers warn about their own types on Python 3.12.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            import faiss
    except ImportError as error:
        raise UserError(f"a FAISS index needs the package faiss-cpu: pip install faiss-cpu ({error})") from error
    return faiss


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Threads that search segments, each with one thread of FAISS."""
    return ThreadPoolExecutor(os.cpu_count() or 1, "faiss", lambda: import_faiss().omp_set_num_threads(1))


def _spread(start: int, stop: int, count: int) -> np.ndarray:
    """At most `count` positions in [start, stop), evenly spaced."""
    return np.unique(np.linspace(start, stop - 1, count).astype(np.int64))


def _is_ivf(path: Path) -> bool:
    """Whether a file holds inverted lists, by FAISS's four-letter name of its kind (`IwPQ`, `IwFl`, `IwSq`, …)."""
    with path.open("rb") as file:
        return file.read(2) == b"Iw"


def _read_links(path: Path) -> None:
    """Bring the links of a graph into the page cache, in large blocks.

    FAISS checks every link when it maps a file, and reads a page at a time from the disk: 13 s instead of 1 s for two
    million vectors. In the file, links are followed by the vectors, which are read when a search needs them.
    """
    with path.open("rb", buffering=0) as file:
        name, dim, num_vectors = struct.unpack("<4siq", file.read(16))
        if name not in _CODE_BYTES:
            return
        size = os.fstat(file.fileno()).st_size - num_vectors * dim * _CODE_BYTES[name]
        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(lambda start: len(os.pread(file.fileno(), _BLOCK, start)), range(0, size, _BLOCK)):
                pass


def _write(index: Any, path: Path) -> None:
    """Write a FAISS file, which appears whole or not at all."""
    partial = path.with_name(f".{path.name}{SUFFIX}")
    import_faiss().write_index(index, str(partial))
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)

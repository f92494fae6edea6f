"""Chooses the kind and the parameters of a FAISS index, and says what it will take, before it is built.

Sizes follow from the layout of the files. Times and recall are estimates. Those of exact search and of graphs start
from 2,000,000 generated vectors of 384 floats on two cores with AVX2, which other programs used as well, and those of
inverted lists from 100,000 of 768 floats with AVX-512 (`benchmarks/index_scale.py`). A build measures the recall that
it has reached.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.config.section import require

SEGMENT = 1 << 20  # passages of one graph: bounds the memory of a build, and what a kill loses
PQ_CENTROIDS = 256  # of each byte of a compressed vector
MAX_EXACT_MS = 20.0  # `auto` searches exactly where a query takes no longer
_GIB = 1 << 30
_IVF_SAMPLES = 64  # training vectors for each list
_MAX_LISTS = 1 << 16


@dataclasses.dataclass(frozen=True)
class FaissPlan:
    """A kind of FAISS index with all its parameters; those of other kinds are 0."""

    kind: str  # flat, hnsw or ivfpq
    dtype: str  # of the stored vectors, which rank the candidates
    candidates: int = 0  # 0: 64, or 4 * k
    hnsw_links: int = 0
    hnsw_build_ef: int = 0
    hnsw_search_ef: int = 0
    ivf_lists: int = 0
    ivf_probes: int = 0
    ivf_train_rows: int = 0
    pq_bytes: int = 0

    def build_facts(self) -> dict[str, Any]:
        """What the files of the index depend on."""
        names = ("kind", "dtype", "hnsw_links", "hnsw_build_ef", "ivf_lists", "ivf_train_rows", "pq_bytes")
        return {name: getattr(self, name) for name in names}

    def num_candidates(self, k: int) -> int:
        """Passages whose exact inner products decide the k best."""
        return max(self.candidates or 64, 4 * k)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What an index takes; bytes, seconds without the encoding, milliseconds per query on two cores."""

    disk: int  # vectors and index, without passages
    build_memory: int
    search_memory: int  # that a search touches again and again: with less, it waits for the disk
    build_s: float
    search_ms: float
    recall: float  # at 10, against exact search


def plan_faiss(config: RetrievalConfig, num_passages: int, dim: int) -> FaissPlan:
    """The index of the configuration for so many passages; the same for the same arguments everywhere."""
    if config.faiss.kind != "auto":
        return _plan(config, config.faiss.kind, num_passages, dim)
    flat = _plan(config, "flat", num_passages, dim)
    if config.encoder.kind == "hash":
        return flat  # most passages share no feature with a query: a graph of them leads nowhere
    taken = estimate(flat, num_passages, dim)
    if taken.search_ms <= MAX_EXACT_MS and taken.search_memory <= config.memory_gb * _GIB:
        return flat
    hnsw = _plan(config, "hnsw", num_passages, dim)
    if estimate(hnsw, num_passages, dim).search_memory <= config.memory_gb * _GIB:
        return hnsw
    return _plan(config, "ivfpq", num_passages, dim)


def _plan(config: RetrievalConfig, kind: str, num_passages: int, dim: int) -> FaissPlan:
    faiss = config.faiss
    dtype = config.vector_dtype
    if dtype == "auto":
        dtype = "float32" if kind == "flat" else "float16"
    if kind == "flat":
        return FaissPlan("flat", dtype)
    if kind == "hnsw":
        return FaissPlan(
            "hnsw", dtype, faiss.candidates, hnsw_links=faiss.hnsw_links, hnsw_build_ef=faiss.hnsw_build_ef,
            hnsw_search_ef=faiss.hnsw_search_ef,
        )  # fmt: skip
    require(
        num_passages >= PQ_CENTROIDS,
        f"retrieval.faiss.kind=ivfpq needs {PQ_CENTROIDS} passages to train on; got {num_passages}",
        "retrieval.faiss.kind",
    )
    lists = faiss.ivf_lists or 1 << max(0, round(math.log2(4 * math.sqrt(num_passages))))
    lists = min(lists, _MAX_LISTS, max(1, num_passages // 39))  # k-means asks for 39 vectors a list
    return FaissPlan(
        "ivfpq", dtype, faiss.candidates, ivf_lists=lists,
        ivf_probes=min(lists, faiss.ivf_probes or max(16, lists // 32)),
        ivf_train_rows=min(num_passages, max(_IVF_SAMPLES * lists, 16_384)), pq_bytes=faiss.pq_bytes or _pq_bytes(dim),
    )  # fmt: skip


def _pq_bytes(dim: int) -> int:
    """The divisor of `dim` that is closest to an eighth of it."""
    return min((d for d in range(1, dim + 1) if dim % d == 0), key=lambda d: abs(8 * d - dim))


def hnsw_segment_bytes(plan: FaissPlan, dim: int, num_passages: int = SEGMENT) -> int:
    """Memory of a graph while it is built: vectors of 8 bits, links, and the vectors that give the scales."""
    return num_passages * (dim + 8 * plan.hnsw_links + 32) + 65_536 * dim * 4


_FLOATS_PER_MS = {"float32": 1.5e6, "float16": 3e5}  # that an exact search of one query reads; halves are widened first
_HNSW_ADD_PER_S = 3200.0  # vectors of 384 floats to two graphs of 2^20 at once, from 100 candidates each
_HNSW_MS = 0.65  # a search of one graph, with 64 candidates
_IVF_FLOPS = 100e9  # of k-means and of the assignment to lists
_IVF_CODES_PER_MS = 2e5
_RERANK_MS = 0.5


def estimate(plan: FaissPlan, num_passages: int, dim: int) -> Estimate:
    """What the index takes, from the rates above."""
    vectors = num_passages * dim * (4 if plan.dtype == "float32" else 2)
    shard = max(vectors // 256, 4096 * dim * 4) + 4096 * dim * 4  # what `encoding.py` holds
    if plan.kind == "flat":
        return Estimate(vectors, shard, vectors, 0.0, num_passages * dim / _FLOATS_PER_MS[plan.dtype], 1.0)
    if plan.kind == "hnsw":
        graph = hnsw_segment_bytes(plan, dim, num_passages)
        segments = -(-num_passages // SEGMENT)
        size = (dim + 216) / 600  # 768 floats take 1.64 times as long as 384
        build_s = num_passages / _HNSW_ADD_PER_S * size * plan.hnsw_build_ef / 100
        search_ms = segments * _HNSW_MS * size * plan.hnsw_search_ef / 64 + _RERANK_MS
        build = hnsw_segment_bytes(plan, dim, min(SEGMENT, num_passages))
        return Estimate(vectors + graph, max(build, shard), graph, build_s, search_ms, 0.99)
    codes = num_passages * (plan.pq_bytes + 8)
    centroids = plan.ivf_lists * dim * 4
    flops = 2 * dim * plan.ivf_lists * (10 * plan.ivf_train_rows + num_passages) + 2 * PQ_CENTROIDS * dim * num_passages
    read = num_passages * plan.ivf_probes / plan.ivf_lists
    search_ms = read / _IVF_CODES_PER_MS + plan.ivf_lists * dim / (2 * _FLOATS_PER_MS["float32"]) + _RERANK_MS
    build = max(plan.ivf_train_rows * dim * 4, 2 * codes, shard) + 2 * centroids
    return Estimate(vectors + codes + centroids, build, codes + centroids, flops / _IVF_FLOPS, search_ms, 0.95)


def check_memory(plan: FaissPlan, num_passages: int, dim: int, memory_gb: float) -> None:
    """Raise a UserError if building the index takes more memory than `retrieval.memory_gb`."""
    needed = estimate(plan, num_passages, dim).build_memory / _GIB
    hint = " or choose fewer retrieval.faiss.ivf_lists" if plan.kind == "ivfpq" else ""
    require(
        needed <= memory_gb,
        f"retrieval.memory_gb must be at least {needed:.2f} to build {plan.kind} over {num_passages} vectors of {dim}; "
        f"got {memory_gb:g}. Raise it{hint}",
        "retrieval.memory_gb",
    )


def describe(plan: FaissPlan, num_passages: int, dim: int) -> str:
    """The index and what it takes, in two lines."""
    taken = estimate(plan, num_passages, dim)
    named = {"links": plan.hnsw_links, "build_ef": plan.hnsw_build_ef, "search_ef": plan.hnsw_search_ef}
    named |= {"lists": plan.ivf_lists, "probes": plan.ivf_probes, "pq_bytes": plan.pq_bytes}
    keys = "".join(f", {value} {name}" for name, value in named.items() if value)
    return (
        f"{num_passages} vectors of {dim} {plan.dtype}, {plan.kind}{keys}: {taken.disk / _GIB:.2f} GiB on disk\n"
        f"expected on two cores: {_time(taken.build_s)} beside encoding with {taken.build_memory / _GIB:.2f} GiB; "
        f"searches of {taken.search_ms:.1f} ms with {taken.search_memory / _GIB:.2f} GiB, recall@10 {taken.recall:.2f}"
    )


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

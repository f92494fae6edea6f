"""Which index is chosen, and what it is said to take."""

from __future__ import annotations

import pytest

from r3rag_jax.config.retrieval import EncoderConfig, FaissConfig, RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.planner import check_memory, describe, estimate, plan_faiss

AUTO = RetrievalConfig(faiss=FaissConfig(kind="auto"), encoder=EncoderConfig(kind="bert", path="e5"))


@pytest.mark.parametrize(
    ("num_passages", "memory_gb", "kind", "dtype"),
    [
        (100, 8.0, "flat", "float32"),  # fewer than IVF-PQ can be trained on
        (10_000, 8.0, "flat", "float32"),
        (2_000_000, 8.0, "hnsw", "float16"),
        (21_000_000, 32.0, "hnsw", "float16"),
        (21_000_000, 8.0, "ivfpq", "float16"),
    ],
)
def test_auto_is_exact_if_that_is_fast_and_compressed_if_memory_is_short(
    num_passages: int, memory_gb: float, kind: str, dtype: str
) -> None:
    plan = plan_faiss(AUTO.replace(memory_gb=memory_gb), num_passages, 768)
    assert (plan.kind, plan.dtype) == (kind, dtype)
    assert estimate(plan, num_passages, 768).search_memory <= memory_gb * 2**30
    assert plan_faiss(AUTO.replace(faiss=FaissConfig(kind=kind)), num_passages, 768) == plan
    # Hashed words are sparse: HNSW over 10,032 passages finds 7 % of their nearest neighbours.
    hashed = AUTO.replace(encoder=EncoderConfig(), memory_gb=memory_gb)
    assert plan_faiss(hashed, num_passages, 768).kind == "flat"


def test_a_build_that_does_not_fit_is_refused() -> None:
    plan = plan_faiss(RetrievalConfig(faiss=FaissConfig(kind="ivfpq")), 21_000_000, 768)
    assert plan.ivf_train_rows == 64 * 16384
    check_memory(plan, 21_000_000, 768, 4.2)  # the sample: 3.0 GiB; lists while they are merged: 4.1 GiB
    with pytest.raises(UserError, match=r"memory_gb must be at least 4\.16 to build ivfpq over .*; got 4\. Raise"):
        check_memory(plan, 21_000_000, 768, 4.0)
    hnsw = plan_faiss(RetrievalConfig(faiss=FaissConfig(kind="hnsw")), 21_000_000, 768)
    check_memory(hnsw, 21_000_000, 768, 1.25)  # one graph of 2^20 vectors at a time


def test_sizes_by_hand() -> None:
    flat = estimate(plan_faiss(RetrievalConfig(), 1000, 64), 1000, 64)
    assert (flat.disk, flat.search_memory, flat.recall) == (1000 * 64 * 4, 1000 * 64 * 4, 1.0)
    plan = plan_faiss(RetrievalConfig(faiss=FaissConfig(kind="ivfpq")), 1_000_000, 768)
    assert (plan.ivf_lists, plan.ivf_probes, plan.pq_bytes, plan.ivf_train_rows) == (4096, 128, 96, 262_144)
    taken = estimate(plan, 1_000_000, 768)
    assert taken.disk == 1_000_000 * (768 * 2 + 96 + 8) + 4096 * 768 * 4
    assert "1000000 vectors of 768 float16, ivfpq, 4096 lists, 128 probes, 96 pq_bytes: 1.54 GiB" in describe(
        plan, 1_000_000, 768
    )
    with pytest.raises(UserError, match=r"retrieval\.faiss\.kind=ivfpq needs 256 passages to train on; got 255"):
        plan_faiss(RetrievalConfig(faiss=FaissConfig(kind="ivfpq")), 255, 768)

"""Search on the devices of two real processes: both find what FAISS finds in one, and a failure of one ends both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bert_files import write_model, write_tokenizer
from corpora import encyclopedia

import r3rag_jax
from r3rag_jax.config.retrieval import EncoderConfig, RetrievalConfig
from r3rag_jax.retrieval.factory import build_index, open_retriever

PROGRAM = """
import json
import sys
from pathlib import Path

import jax
from r3rag_jax.config.mesh import MeshConfig
from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.parallel.processes import joined
from r3rag_jax.retrieval.broadcast import BroadcastRetriever
from r3rag_jax.retrieval.factory import open_retriever
from r3rag_jax.retrieval.vectors import VectorShards

config, index_dirs, coordinator, rank = json.loads(sys.argv[1]), sys.argv[2].split(), sys.argv[3], int(sys.argv[4])
read = []
rows = VectorShards.rows
VectorShards.rows = lambda self, start, stop: read.append((start, stop)) or rows(self, start, stop)
with joined(MeshConfig(distributed=True, coordinator=coordinator, num_processes=2, process_id=rank)):
    retriever = open_retriever(RetrievalConfig(**config), Path(index_dirs[min(rank, len(index_dirs) - 1)]))
    assert not isinstance(retriever, BroadcastRetriever) and jax.device_count() == 8
    found = [
        [[hit.passage.id, hit.score.hex()] for hit in hits]
        for k in (2, 7) for hits in retriever.search(json.loads(sys.argv[5]), k)
    ]
    print("OUT" + json.dumps({"hits": found, "read": read, "fingerprint": retriever.fingerprint}), flush=True)
"""
QUERIES = ["director of The Silent Tower", "qqqq", "harbor", "Where is The Iron Crown set?", "music by Bo Ter7"]


def run(config: dict, index_dirs: str, tmp_path: Path) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of both processes, each with four devices."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(r3rag_jax.__file__).parent.parent),
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(config), index_dirs, coordinator]
    processes = [
        subprocess.Popen(
            [*command, str(rank), json.dumps(QUERIES)], env=environment, stdout=-1, stderr=-1, text=True, cwd=tmp_path
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("hash", "bfloat16"), ("bert", "float32")])
def test_two_processes_find_what_faiss_finds(tmp_path: Path, kind: str, dtype: str) -> None:
    """The random model's vectors are so near each other that bfloat16 would find other candidates."""
    encoder = {"kind": kind, "dim": 128}
    if kind == "bert":
        (tmp_path / "model").mkdir()
        write_model(tmp_path / "model")
        write_tokenizer(tmp_path / "model")
        encoder |= {"path": str(tmp_path / "model"), "pooling": "mean"}
    flat = RetrievalConfig(encoder=EncoderConfig(**encoder))
    build_index(flat, encyclopedia(), tmp_path / "index")
    settings = {"kind": "device", "encoder": encoder, "device": {"dtype": dtype}}
    (status, out, error), second = run(settings, str(tmp_path / "index"), tmp_path)
    assert (status, second[0]) == (0, 0), error + second[2]
    ours, others = (json.loads(text.split("OUT", 1)[1]) for text in (out, second[1]))
    assert ours["hits"] == others["hits"] and ours["fingerprint"] == others["fingerprint"]  # scores included
    assert ours["read"] and others["read"]
    assert {tuple(rows) for rows in ours["read"]}.isdisjoint(tuple(rows) for rows in others["read"])
    retriever = open_retriever(flat, tmp_path / "index")
    expected = [hits for k in (2, 7) for hits in retriever.search(QUERIES, k)]
    if kind == "hash":  # the same vectors, and sums in the same order
        assert ours["hits"] == [[[hit.passage.id, hit.score.hex()] for hit in hits] for hits in expected]
    for found, hits in zip(ours["hits"], expected, strict=True):
        scores = [float.fromhex(score) for _, score in found]
        np.testing.assert_allclose(scores, [hit.score for hit in hits], atol=2e-6)


@pytest.mark.slow
def test_processes_that_see_different_indexes_end_together(tmp_path: Path) -> None:
    config = RetrievalConfig(encoder=EncoderConfig(dim=128))
    build_index(config, encyclopedia(), tmp_path / "index")
    build_index(config, encyclopedia()[:-1], tmp_path / "other")
    settings = {"kind": "device", "encoder": {"dim": 128}}
    found = run(settings, f"{tmp_path / 'index'} {tmp_path / 'other'}", tmp_path)
    assert all(status not in (0, None) and "must have the same index" in error for status, _, error in found), found
    found = run(settings, f"{tmp_path / 'index'} {tmp_path / 'nowhere'}", tmp_path)
    assert all(status not in (0, None) and "nowhere" in error for status, _, error in found), found

"""An index whose passages two processes encode is that of one, and a process with another encoder ends both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bert_files import write_model, write_tokenizer
from corpora import encyclopedia
from two_processes import free_port, spawn

from r3rag_jax.config.retrieval import EncoderConfig, RetrievalConfig
from r3rag_jax.retrieval.encoders.spread import encoding_together
from r3rag_jax.retrieval.factory import build_index
from r3rag_jax.retrieval.vectors import VectorShards

PROGRAM = """
import json
import sys

import jax
from r3rag_jax.config.mesh import MeshConfig
from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.parallel.processes import joined, on_process_0
from r3rag_jax.retrieval.encoders.bert import BertEncoder
from r3rag_jax.retrieval.encoders.spread import encoding_together
from r3rag_jax.retrieval.factory import build_index

sys.path[:0] = [sys.argv[5]]
from corpora import encyclopedia

settings, index, coordinator, rank = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
encoded, encode = [], BertEncoder.encode
BertEncoder.encode = lambda self, texts, *, kind: encoded.append(len(texts)) or encode(self, texts, kind=kind)
with joined(MeshConfig(distributed=True, coordinator=coordinator, num_processes=2, process_id=rank)):
    config = RetrievalConfig(**settings[rank])
    with encoding_together(config) as spread:
        on_process_0(lambda: build_index(config, encyclopedia(), index, spread=spread), "index")
    print("OUT" + json.dumps(encoded), flush=True)
"""


def settings(path: Path, **changes: int) -> dict[str, object]:
    """Section `retrieval` with a random encoder, which is written to `path`."""
    path.mkdir()
    write_model(path, **changes)
    write_tokenizer(path)
    return {"encoder": {"kind": "bert", "path": str(path), "pooling": "mean"}}


def build_with_two(given: list[dict[str, object]], directory: Path) -> list[tuple[int, str]]:
    """(exit status, what was said) of two processes that build the index `directory`/two together."""
    words = [json.dumps(given), str(directory / "two"), f"127.0.0.1:{free_port()}"]
    commands = [["-c", PROGRAM, *words, str(rank), str(Path(__file__).parent)] for rank in range(2)]
    processes = [spawn(command, 2, directory) for command in commands]
    try:
        said = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.slow
def test_two_processes_encode_half_of_the_passages_each(tmp_path: Path) -> None:
    config = settings(tmp_path / "model")
    found = build_with_two([config, config], tmp_path)
    assert [status for status, _ in found] == [0, 0], found
    assert [json.loads(text.split("OUT", 1)[1]) for _, text in found] == [[108], [108]]  # of 216
    build_index(RetrievalConfig(**config), encyclopedia(), tmp_path / "one")  # type: ignore[arg-type]
    one, two = (VectorShards.open(tmp_path / name).rows(0, 216) for name in ("one", "two"))
    np.testing.assert_allclose(two, one, atol=1e-6)


@pytest.mark.slow
def test_another_encoder_on_a_host_ends_all(tmp_path: Path) -> None:
    found = build_with_two([settings(tmp_path / "a"), settings(tmp_path / "b", num_hidden_layers=1)], tmp_path)
    assert all(status != 0 and "must have the same encoder" in text for status, text in found), found
    assert not (tmp_path / "two").exists()


def test_one_process_encodes_alone() -> None:
    with encoding_together(RetrievalConfig(encoder=EncoderConfig(dim=128))) as spread:
        encoder = object()
        assert spread(encoder) is encoder  # type: ignore[arg-type]

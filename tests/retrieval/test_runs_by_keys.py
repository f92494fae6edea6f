"""A finished run evaluated with retrievers that keys alone choose: equal hits, equal trajectories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from serving import server_process

from r3rag_jax import evaluate, index

pytestmark = pytest.mark.slow


@pytest.fixture
def run(finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run, with an evaluation named `flat` by its own FAISS index."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    directory = Path(shutil.copytree(finished("tags"), tmp_path / "run"))
    assert b'"passages": [{"id"' in evaluated(directory, "flat")[0]  # there is something to find
    return directory


def evaluated(run: Path, name: str, *keys: str) -> tuple[bytes, dict[str, Any]]:
    """Trajectories and result of an evaluation."""
    assert evaluate.main(["--checkpoint", str(run), "--name", name, *keys]) == 0
    return (run / "trajectories" / f"{name}.jsonl").read_bytes(), json.loads(
        (run / "eval" / f"{name}.json").read_text()
    )


def build(run: Path, out: Path, *keys: str) -> None:
    """An index of the run's passages, from the command line."""
    corpus = tiny_run.open_components(run).dataset.path_of("corpus")
    assert index.main(["build", "--corpus", str(corpus), "--out", str(out), *keys]) == 0


def test_a_server_in_a_process_of_its_own(run: Path) -> None:
    flat, result = evaluated(run, "flat")
    with server_process(run / "index") as (_, url):
        for format in ("native", "search_r1"):
            keys = ("retrieval.kind=http", f"retrieval.endpoint.url={url}", f"retrieval.endpoint.format={format}")
            found, remote = evaluated(run, format, *keys)
            assert found == flat
            assert (remote["fingerprint"] == result["fingerprint"]) is (format == "native")


def test_milvus_lite(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("milvus_lite", reason="needs the extra milvus")
    keys = ("retrieval.kind=milvus", "retrieval.encoder.dim=256")
    build(run, tmp_path / "index", *keys)
    assert evaluated(run, "milvus", *keys, f"retrieval.index_dir={tmp_path / 'index'}")[0] == evaluated(run, "flat")[0]


def test_bm25(run: Path, tmp_path: Path) -> None:
    build(run, tmp_path / "index", "retrieval.kind=bm25")
    found, lexical = evaluated(run, "bm25", "retrieval.kind=bm25", f"retrieval.index_dir={tmp_path / 'index'}")
    flat, dense = evaluated(run, "flat")
    assert len(found.splitlines()) == len(flat.splitlines())
    assert lexical["groups"]["all"]["retrievals"] > 0  # of a small world, perhaps the same passages
    assert lexical["fingerprint"]["index"] != dense["fingerprint"]["index"]

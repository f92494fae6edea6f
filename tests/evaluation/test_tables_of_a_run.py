"""Every table of a finished run, by the entry point."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run

from r3rag_jax import evaluate

FLAGS = {
    "main": ["--systems", "closed_book", "cold_start", "r3rag"],
    "rewards": [],
    "max_steps": ["--values", "1,3"],
    "top_k": ["--values", "1,2"],
    "retrievers": [],
    "tokens": ["--systems", "r3rag"],
}


@pytest.mark.slow
def test_every_table_of_a_finished_run(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished("tags"), tmp_path / "run")
    own = json.loads((run / "eval" / "r3rag.json").read_text())["groups"]["all"]
    for name, flags in FLAGS.items():
        assert evaluate.main(["table", name, "--checkpoint", str(run), *flags]) == 0
        table = json.loads((run / "tables" / f"{name}.json").read_text())
        assert table["columns"] == {"test": 4} and "evaluate table" in table["command"]
        assert "Written: " in capsys.readouterr().out
        rows = {row["title"]: row for row in table["rows"]}
        if name in ("main", "tokens"):
            # The eval phase's results are used, with no rollout.
            assert Path(rows["R3-RAG"]["results"]["test"]) == run / "eval" / "r3rag.json"
            assert rows["R3-RAG"]["numbers"]["test"]["em"] == own["em"]
        if name == "retrievers":
            assert list(rows) == ["faiss", "bm25"] and (run / "indexes" / "bm25" / "fingerprint.json").is_file()
    before = tiny_run.files(run)
    assert evaluate.main(["table", "top_k", "--checkpoint", str(run), *FLAGS["top_k"]]) == 0
    assert tiny_run.files(run) == before  # nothing is done twice
    one, other = (run / "eval" / "tables" / f"r3rag-rl-test-top_k={k}.json" for k in (1, 2))
    one = one if one.is_file() else run / "eval" / "r3rag.json"  # the run's own depth
    assert evaluate.main(["compare", str(one), str(other), "--varied", "retrieval.top_k"]) == 0
    assert "They differ in retrieval.top_k (1, 2)." in capsys.readouterr().out
    assert evaluate.main(["runs", str(run), str(run)]) == 0
    assert "mean of 2" in capsys.readouterr().out

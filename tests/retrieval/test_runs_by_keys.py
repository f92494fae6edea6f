"""Whole runs in miniature whose retrievers keys alone choose: with exact dense search, the runs that FAISS gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
import tiny_run
from serving import server_process

from r3rag_jax import evaluate, train

pytestmark = pytest.mark.slow


@pytest.fixture
def flat(finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run that searches FAISS in its own process."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return finished("tags")


def trained(directory: Path, base: Path, *keys: str) -> Path:
    """The same run with other keys, as on the command line."""
    recipe = tiny_run.write_recipe(directory, base)
    assert train.main(["--config", str(recipe), *keys]) == 0
    return directory / "run"


def texts(run: Path, folder: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in (run / folder).iterdir()}


def passages_found(run: Path) -> int:
    """Trajectories of the RL rollouts in which a passage was found."""
    rows = (run / "trajectories" / "rl.jsonl").read_text().splitlines()
    return sum('"passages": [{"id"' in row for row in rows)


def assert_same_run(ours: Path, flat: Path) -> None:
    """Data, trajectories of all phases, metrics and weights are equal to the last bit."""
    assert passages_found(flat) > 0
    for folder in ("trajectories", "data"):
        assert texts(ours, folder) == texts(flat, folder)
    assert tiny_run.metrics(ours) == tiny_run.metrics(flat)
    for phase in ("sft", "rl"):
        assert {name: array.tobytes() for name, array in tiny_run.weights(ours, phase).items()} == {
            name: array.tobytes() for name, array in tiny_run.weights(flat, phase).items()
        }


def searched_index(run: Path) -> dict[str, str]:
    """Evaluation -> fingerprint of the index that it searched."""
    return {path.stem: json.loads(path.read_text())["fingerprint"]["index"] for path in (run / "eval").glob("*.json")}


def test_a_server_in_a_process_of_its_own(flat: Path, base: Path, tmp_path: Path) -> None:
    with server_process(flat / "index") as (_, url):
        keys = ("retrieval.kind=http", f"retrieval.endpoint.url={url}")
        ours = trained(tmp_path, base, *keys, "retrieval.endpoint.format=native")
        assert_same_run(ours, flat)
        assert searched_index(ours) == searched_index(flat) != {}


def test_a_server_of_another_format(flat: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(flat, tmp_path / "run"))
    with server_process(flat / "index") as (_, url):
        keys = ("retrieval.kind=http", f"retrieval.endpoint.url={url}", "retrieval.endpoint.format=search_r1")
        for name, words in (("flat", ()), ("search_r1", keys)):
            assert evaluate.main(["--checkpoint", str(run), "--name", name, *words]) == 0
    found = texts(run, "trajectories")
    assert '"passages": [{"id"' in found["flat.jsonl"]
    assert found["search_r1.jsonl"] == found["flat.jsonl"]
    index = searched_index(run)
    assert index["search_r1"] != index["flat"]  # which index it is, the server does not say


def test_milvus_lite(flat: Path, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("milvus_lite", reason="needs the extra milvus")
    assert_same_run(trained(tmp_path, base, "retrieval.kind=milvus"), flat)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
def test_the_devices_of_the_mesh(flat: Path, base: Path, tmp_path: Path) -> None:
    assert_same_run(trained(tmp_path, base, "retrieval.kind=device"), flat)


def test_bm25(flat: Path, base: Path, tmp_path: Path) -> None:
    ours = trained(tmp_path, base, "retrieval.kind=bm25")
    assert passages_found(ours) > 0
    mine, theirs = texts(ours, "data"), texts(flat, "data")
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == ["sft.jsonl"]  # whose passages were retrieved
    lexical, dense = searched_index(ours), searched_index(flat)
    assert lexical.keys() == dense.keys()
    assert any(lexical[name] != dense[name] for name in dense)  # those that search

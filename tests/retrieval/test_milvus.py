"""Milvus Lite: an index built, searched and filtered by keys alone, with the hits of FAISS."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import AxisEncoder, encyclopedia, ids

from r3rag_jax import index as command
from r3rag_jax.config import RetrievalConfig, load_config
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval import milvus
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.retrieval.factory import build_index, open_retriever
from r3rag_jax.types import Passage

pytest.importorskip("milvus_lite", reason="needs the extra milvus")
QUERIES = [*(passage.title for passage in encyclopedia()[:30:3]), "Who directed The Silver Harbor?", "", "qqqq"]


def config(*overrides: str, kind: str = "milvus") -> RetrievalConfig:
    keys = [f"retrieval.kind={kind}", "retrieval.encoder.dim=64", *overrides, "phases=index"]
    return load_config(None, keys).retrieval


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("milvus") / "index"
    build_index(config(), encyclopedia(), directory)
    return directory


def test_hits_are_those_of_faiss(index: Path, tmp_path: Path) -> None:
    build_index(config(kind="faiss"), encyclopedia(), tmp_path / "faiss")
    exact = open_retriever(config(kind="faiss"), tmp_path / "faiss")
    found = open_retriever(config(), index)
    for k in (1, 5, 300):
        assert found.search(QUERIES, k) == exact.search(QUERIES, k)
    assert found.search([], 3) == [] and found.search([""], 3) == [[]]
    assert found.fingerprint == open_retriever(config(), index).fingerprint != exact.fingerprint


def test_a_database_that_was_opened_leaves_the_index_as_it_was_built(index: Path) -> None:
    assert list((index / milvus.LITE_FILE).iterdir())
    open_retriever(config(), index).search(["harbor"], 1)
    assert command.main(["check", "--index", str(index)]) == 0


def test_a_filter_leaves_out_what_it_does_not_name(index: Path) -> None:
    filtered = open_retriever(config('retrieval.milvus.filter=title like "The Iron%"'), index)
    hits = filtered.search(["The Silver Harbor", "The Iron Crown"], 50)
    assert all(hit.passage.title.startswith("The Iron ") for row in hits for hit in row)
    assert len(hits[0]) == len(hits[1]) == 27  # nine films, three passages each
    assert filtered.fingerprint != open_retriever(config(), index).fingerprint
    some = open_retriever(config('retrieval.milvus.filter=id in ["p3", "p9"] and num_chars > 10'), index)
    assert sorted(ids(some.search(["harbor"], 5)[0])) == ["p3", "p9"]
    with pytest.raises(UserError, match=r"retrieval\.milvus\.filter must be an expression of Milvus over .*; got 'tit"):
        open_retriever(config("retrieval.milvus.filter=titel == 3"), index)


def test_ties_are_ranked_by_position_however_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty passages of one vector: more than the candidates that the first search asks for."""
    contents = ["21", *["34"] * 30, "12", *["43"] * 3]
    passages = [Passage(f"p{number}", text) for number, text in enumerate(contents)]
    monkeypatch.setattr(milvus, "new_encoder", lambda config, store: AxisEncoder())
    build_index(config(), passages, tmp_path / "index")
    found = open_retriever(config(), tmp_path / "index", AxisEncoder)
    assert ids(found.search(["34"], 4)[0]) == ["p1", "p2", "p3", "p4"]
    rows = found.search(["34", "43", "21"], 30)
    assert ids(rows[0]) == [f"p{number}" for number in range(1, 31)]
    assert ids(rows[1])[:5] == ["p32", "p33", "p34", "p0", "p1"]


def test_a_build_that_was_killed_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the unfinished chunk are written again, and no passage is encoded twice before it."""
    monkeypatch.setattr(milvus, "CHUNK", 50)
    uri = f"retrieval.milvus.uri={tmp_path / 'milvus.db'}"

    class Failing:
        def __init__(self, encoder: Any, left: int):
            self._encoder, self.left, self.texts = encoder, left, []  # type: ignore[var-annotated]

        def __getattr__(self, name: str) -> Any:
            return getattr(self._encoder, name)

        def encode(self, texts: Sequence[str], kind: Any = "query") -> np.ndarray:
            self.left -= 1
            if self.left < 0:
                raise UserError("killed")
            self.texts += texts
            return self._encoder.encode(texts, kind=kind)

    new_encoder, encoders = milvus.new_encoder, []

    def failing(config: RetrievalConfig, store: Any) -> Failing:
        encoders.append(Failing(new_encoder(config, store), 2 if not encoders else 99))
        return encoders[-1]

    monkeypatch.setattr(milvus, "new_encoder", failing)
    with pytest.raises(UserError, match="killed"):
        build_index(config(uri), encyclopedia(), tmp_path / "index")
    assert not (tmp_path / "index").exists()
    build_index(config(uri), encyclopedia(), tmp_path / "index")
    assert [len(encoder.texts) for encoder in encoders] == [100, 116]
    build_index(config(uri), encyclopedia(), tmp_path / "again")  # another directory of the same content
    assert len(encoders[2].texts) == 0
    first, second = (open_retriever(config(uri), tmp_path / name) for name in ("index", "again"))
    assert first.search(QUERIES, 5) == second.search(QUERIES, 5) and first.fingerprint == second.fingerprint


def test_what_cannot_be_opened_says_why(index: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"retrieval\.milvus\.uri: http://127\.0\.0\.1:9 cannot be used"):
        open_retriever(config("retrieval.milvus.uri=http://127.0.0.1:9", "retrieval.milvus.timeout_s=0.5"), index)
    with pytest.raises(UserError, match=r"Milvus must have the collection r3rag_\w+ of .*; it has not"):
        open_retriever(config(f"retrieval.milvus.uri={tmp_path / 'empty.db'}"), index)
    with pytest.raises(UserError, match=r"retrieval\.milvus\.key_env names the environment variable NO_SUCH"):
        open_retriever(config("retrieval.milvus.key_env=NO_SUCH"), index)
    with pytest.raises(UserError, match=r"must hold an index of retrieval\.kind=milvus; got one of faiss"):
        build_index(config(kind="faiss"), encyclopedia()[:3], tmp_path / "faiss")
        open_retriever(config(), tmp_path / "faiss")
    with pytest.raises(UserError, match=r"an id has at most 1024 bytes; got 'xxx"):
        build_index(config(), [Passage("x" * 1025, "long")], tmp_path / "long")


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("uri=/data/milvus", "must be an http(s) URL without user, query or fragment, or a path that ends in .db"),
        ("uri=http://user:secret@host", "must be an http(s) URL"),
        ("collection=my corpus", "must be letters, digits and _"),
        ("index_params=[]", "must be a JSON object"),
        ("search_params=ef", "must be a JSON object"),
        ("index=FAST", "must be one of FLAT, AUTOINDEX"),
    ],
)
def test_keys_that_are_refused(override: str, rule: str) -> None:
    with pytest.raises(UserError) as caught:
        config(f"retrieval.milvus.{override}")
    assert rule in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.slow
def test_an_approximate_index_is_refined_by_exact_products(tmp_path: Path) -> None:
    def searched(*overrides: str) -> Retriever:
        settings = config(*overrides, f"retrieval.milvus.uri={tmp_path / 'milvus.db'}")
        build_index(settings, encyclopedia(), tmp_path / "index")
        return open_retriever(settings, tmp_path / "index")

    exact = searched().search(QUERIES, 5)
    graph = searched("retrieval.milvus.index=HNSW", "retrieval.milvus.search_params=" + json.dumps({"ef": 200}))
    assert graph.search(QUERIES, 5) == exact

"""BM25: scores by hand, ranks and ties, and the files of an index."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora import encyclopedia, ids

import r3rag_jax
from r3rag_jax.config import RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import RetrievalError, Retriever
from r3rag_jax.retrieval.bm25 import BM25Retriever
from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.factory import build_index, open_encoder, open_retriever, open_store
from r3rag_jax.types import Passage

CONFIG = RetrievalConfig(kind="bm25")
DOORS = [
    Passage("0", "The red door"),
    Passage("1", "red red RED lamp, a lamp by the door of Ann"),
    Passage("2", "Blue lamp"),
    Passage("3", "The green door"),
    Passage("4", "blue lamp"),
]


def open_over(passages: list[Passage], directory: Path) -> Retriever:
    build_index(CONFIG, passages, directory / "index")
    return open_retriever(CONFIG, directory / "index")


def test_nothing_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_over(DOORS, tmp_path).search(["red"], 1)
    assert caplog.records == []


def test_scores_by_hand(tmp_path: Path) -> None:
    retriever = open_over(DOORS, tmp_path)
    # Words of two letters or more: 3, 10, 2, 3 and 2 of them, 4 on average. `red`: df 2, `lamp`: df 3, of 5 passages.
    idf_red, idf_lamp = math.log(1 + 3.5 / 2.5), math.log(1 + 2.5 / 3.5)

    def tf(count: int, length: int) -> float:
        return count / (count + 1.5 * (0.25 + 0.75 * length / 4))

    expected = {
        "1": idf_red * tf(3, 10) + idf_lamp * tf(2, 10),
        "0": idf_red * tf(1, 3),
        "2": idf_lamp * tf(1, 2),
        "4": idf_lamp * tf(1, 2),
    }
    assert {id: round(score, 4) for id, score in expected.items()} == {
        "1": 0.6323, "0": 0.3946, "2": 0.2782, "4": 0.2782
    }  # fmt: skip
    [hits] = retriever.search(["Red lamp?"], 9)
    assert ids(hits) == list(expected)
    np.testing.assert_allclose([hit.score for hit in hits], list(expected.values()), rtol=1e-6)
    assert [hit.passage for hit in hits] == [DOORS[int(id)] for id in expected]
    assert hits[2].score == hits[3].score


def test_a_word_that_is_asked_twice_counts_twice(tmp_path: Path) -> None:
    once, twice = open_over(DOORS, tmp_path).search(["green", "green Green"], 1)
    assert twice[0].score == pytest.approx(2 * once[0].score)


def test_ties_go_to_the_first_passage_also_at_the_cut(tmp_path: Path) -> None:
    passages = [Passage(str(i), "a lamp" if i % 3 else "a door, a lamp") for i in range(300)]
    retriever = open_over(passages, tmp_path)
    for k in (1, 7, 299):
        [hits] = retriever.search(["lamp"], k)
        short = [str(i) for i in range(300) if i % 3]
        assert ids(hits) == (short + [str(i) for i in range(0, 300, 3)])[:k]


def test_nothing_and_failures_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = open_over(DOORS, tmp_path)
    assert retriever.search([], 3) == []
    assert retriever.search(["", "?", "yellow", "a"], 3) == [[], [], [], []]
    with pytest.raises(ValueError, match="k must be positive; got 0"):
        retriever.search(["red"], 0)
    monkeypatch.setattr(retriever, "_index", None)
    with pytest.raises(RetrievalError, match=r"search failed for 'red': AttributeError"):
        retriever.search(["red"], 3)


def test_names_are_found_in_an_encyclopedia(tmp_path: Path) -> None:
    retriever = open_over(encyclopedia(), tmp_path)
    queries = [f"Who directed {passage.title}?" for passage in encyclopedia()[::3]]
    found = [ids(hits) for hits in retriever.search(queries, 3)]
    assert np.mean([f"p{3 * number}" in top for number, top in enumerate(found)]) > 0.95
    assert found == [ids(retriever.search([query], 3)[0]) for query in queries]


def test_index_files(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    build_index(CONFIG, encyclopedia(), tmp_path / "index", lambda *numbers: told.append(numbers))
    assert told == [(216, 216)]
    retriever = open_retriever(CONFIG, tmp_path / "index")
    assert isinstance(retriever, BM25Retriever)
    assert isinstance(retriever._index.scores["data"], np.memmap)
    assert list(open_store(tmp_path / "index").passages()) == encyclopedia()
    assert not (tmp_path / "index" / "encoder.npz").exists()
    encoder = open_encoder(CONFIG, tmp_path / "index")  # a reward may need one although the retriever does not
    assert encoder.fingerprint == HashEncoder().fit(passage.contents for passage in encyclopedia()).fingerprint
    other = open_over(encyclopedia()[::-1], tmp_path / "other")
    assert other.fingerprint != retriever.fingerprint
    with pytest.raises(UserError, match=r"must hold an index of retrieval\.kind=faiss; got one of bm25"):
        open_retriever(RetrievalConfig(), tmp_path / "index")
    [data] = (tmp_path / "index" / "bm25").glob("data*")
    data.write_bytes(data.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match=r"data.*\.npy must be the file that was built"):
        open_retriever(CONFIG, tmp_path / "index")


def test_settings_are_those_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_over(DOORS, tmp_path)
    monkeypatch.setattr("r3rag_jax.retrieval.bm25.SETTINGS", '["lucene", 0.9]')
    with pytest.raises(UserError, match=r'must have the settings \["lucene", 0\.9\]; got \["lucene", 1\.5, .*Build'):
        open_retriever(CONFIG, tmp_path / "index")
    with pytest.raises(UserError, match=r"words of two letters or digits at least; got none"):
        build_index(CONFIG, [Passage("0", "a b")], tmp_path / "none")


def test_an_index_does_not_depend_on_the_process(tmp_path: Path) -> None:
    # Python's hash() of strings, and so the order of sets, changes from process to process.
    program = (
        "import sys\nfrom pathlib import Path\nfrom corpora import encyclopedia\n"
        "from r3rag_jax.config import RetrievalConfig\nfrom r3rag_jax.retrieval.factory import build_index\n"
        "build_index(RetrievalConfig(kind='bm25'), encyclopedia(), Path(sys.argv[1]))"
    )
    path = os.pathsep.join([str(Path(r3rag_jax.__file__).parent.parent), str(Path(__file__).parent)])
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
        subprocess.run([sys.executable, "-c", program, str(tmp_path / seed)], check=True, env=environment)
    first, second = (json.loads((tmp_path / seed / "fingerprint.json").read_text()) for seed in ("1", "2"))
    assert first == second

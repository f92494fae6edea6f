"""Exact search with FAISS: ranks, ties, failures, and what it finds after it was written to a directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpora import ADJECTIVES, NOUNS, AxisEncoder, encyclopedia, ids

from r3rag_jax.config.retrieval import EncoderConfig, RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import RetrievalError
from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.factory import build_index, open_retriever, open_store
from r3rag_jax.retrieval.faiss import FaissRetriever
from r3rag_jax.types import Passage

CONFIG = RetrievalConfig()


@pytest.fixture(scope="module")
def encoder() -> HashEncoder:
    return HashEncoder().fit(passage.contents for passage in encyclopedia())


@pytest.fixture(scope="module")
def index(encoder: HashEncoder) -> FaissRetriever:
    return FaissRetriever.of(encoder, encyclopedia())


def test_names_decide_first_and_relation_words_among_the_passages_of_a_name(index):
    # Every word of a title occurs in eight other titles or more, and "of" in two of three passages.
    queries, expected = [], []
    for number, (adjective, noun) in enumerate((a, n) for a in ADJECTIVES for n in NOUNS):
        title = f"The {adjective} {noun}"
        queries += [f"director of {title}", f"Where is {title} set?", f"composer of {title}"]
        expected += [f"p{3 * number}", f"p{3 * number + 1}", f"p{3 * number + 2}"]
    found = [ids(hits) for hits in index.search(queries, 3)]
    assert sum(id in top3 for id, top3 in zip(expected, found, strict=True)) == len(queries)
    in_top2 = [id in top3[:2] for id, top3 in zip(expected, found, strict=True)]
    assert np.mean(in_top2) > 0.85  # two of three passages would be 0.67 by chance


def test_hits_are_sorted_and_their_scores_are_the_inner_products(encoder, index):
    query = "composer of The Golden Crown"
    (hits,) = index.search([query], 5)
    contents = [hit.passage.contents for hit in hits]
    expected = encoder.encode(contents, kind="passage") @ encoder.encode([query])[0]
    np.testing.assert_allclose([hit.score for hit in hits], expected, atol=1e-6)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_hits_do_not_depend_on_the_batch(index):
    # FAISS switches to matrix products from 20 queries on, which round differently.
    queries = [passage.title for passage in encyclopedia()[:60]]
    batched = index.search(queries, 6)
    assert batched == [index.search([query], 6)[0] for query in queries]


def test_ties_go_to_the_first_passage_also_at_the_cut():
    passages = [Passage(str(number), "01") for number in range(40)]
    passages[3], passages[17] = Passage("3", "10"), Passage("17", "11")
    index = FaissRetriever.of(AxisEncoder(), passages)
    (hits,) = index.search(["01"], 4)
    assert ids(hits) == ["0", "1", "2", "4"]
    (hits,) = index.search(["10"], 3)
    assert ids(hits) == ["3", "17", "0"]
    np.testing.assert_allclose([hit.score for hit in hits], [1.0, 0.5**0.5, 0.0], atol=1e-6)


def test_k_beyond_the_corpus_returns_all_of_it():
    index = FaissRetriever.of(AxisEncoder(), [Passage("a", "01"), Passage("b", "10")])
    assert [ids(hits) for hits in index.search(["01", "10"], 9)] == [["a", "b"], ["b", "a"]]


def test_no_queries_no_features_no_k(index):
    assert index.search([], 3) == []
    nothing, something = index.search(["qqqq xzxz", "Silver Harbor"], 3)
    assert nothing == []
    assert len(something) == 3
    with pytest.raises(ValueError, match="k must be positive; got 0"):
        index.search(["Silver Harbor"], 0)


class BrokenEncoder(AxisEncoder):
    def encode(self, texts, *, kind="query"):
        vectors = super().encode(["01"] * len(texts))
        if kind == "passage":
            return vectors
        if texts[0] == "shape":
            return vectors[:, :1]
        if texts[0] == "nan":
            return vectors * np.nan
        raise OSError("the encoder went away")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("boom", "'boom'.*went away"),
        ("shape", r"'shape'.*\(1, 2\) floats; got \(1, 1\)"),
        ("nan", "'nan'.*finite"),
    ],
)
def test_failed_search_raises_with_its_query_and_is_never_empty(query, message):
    index = FaissRetriever.of(BrokenEncoder(), [Passage("a", "x")])
    with pytest.raises(RetrievalError, match=message):
        index.search([query], 1)


def test_failing_faiss_raises_a_retrieval_error(index, monkeypatch):
    class BrokenFaiss:
        def search(self, vectors, k):
            raise RuntimeError("out of memory")

    monkeypatch.setattr(index, "_index", BrokenFaiss())
    with pytest.raises(RetrievalError, match=r"'a0', 'a1', 'a2' and 2 more.*out of memory"):
        index.search(["a0", "a1", "a2", "a3", "silver"], 1)


def test_index_refuses_a_bad_corpus():
    with pytest.raises(UserError, match="at least one passage"):
        FaissRetriever.of(AxisEncoder(), [])
    with pytest.raises(UserError, match="'a' occurs twice"):
        FaissRetriever.of(AxisEncoder(), [Passage("a", "01"), Passage("a", "10")])


# ---- index directories ----


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build_index(CONFIG, encyclopedia(), tmp_path / "index")
    return tmp_path / "index"


def test_opened_index_finds_the_same(index, saved):
    opened = open_retriever(CONFIG, saved)
    queries = ["director of The Silent Tower", "harbor"]
    assert opened.search(queries, 5) == index.search(queries, 5)
    assert opened.fingerprint == index.fingerprint
    assert list(open_store(saved).passages()) == encyclopedia()


def test_building_replaces_the_former_index_whole_and_leaves_nothing_else(saved):
    (saved / "stale").write_text("of another index")
    build_index(CONFIG, [Passage("a", '"Ann"\nAnn sings.')], saved)
    assert sorted(path.name for path in saved.iterdir()) == [
        "encoder.npz",
        "fingerprint.json",
        "passage_hashes.npy",
        "passage_offsets.npy",
        "passage_positions.npy",
        "passages.jsonl",
        "vectors-00000.npy",
    ]
    assert [path.name for path in saved.parent.iterdir()] == ["index"]
    assert len(open_store(saved)) == 1


def test_failed_build_keeps_the_former_index(index, saved, monkeypatch):
    def fail(self, directory):
        raise OSError("disk full")

    monkeypatch.setattr(HashEncoder, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        build_index(CONFIG, [Passage("a", '"Ann"\nAnn sings.')], saved)
    with pytest.raises(UserError, match="'a' occurs twice: passages 1 and 3 of the corpus"):
        build_index(CONFIG, [Passage("a", "x"), Passage("b", "y"), Passage("a", "z")], saved)
    with pytest.raises(UserError, match="at least one passage"):
        build_index(CONFIG, [], saved)
    assert open_retriever(CONFIG, saved).fingerprint == index.fingerprint
    assert [path.name for path in saved.parent.iterdir()] == ["index"]


@pytest.mark.parametrize(
    "name", ["encoder.npz", "fingerprint.json", "vectors-00000.npy", "passages.jsonl", "passage_offsets.npy"]
)
def test_missing_or_corrupt_file_is_named(saved, name):
    path = saved / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=name):
        open_retriever(CONFIG, saved)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}(:| is missing)"):
        open_retriever(CONFIG, saved)


def test_changed_passage_is_caught_by_its_digest(saved):
    path = saved / "passages.jsonl"
    path.write_text(path.read_text().replace("Kal5mouth", "Kal6mouth"))
    for open_it in (lambda: open_retriever(CONFIG, saved), lambda: open_store(saved)):
        with pytest.raises(UserError, match=r"passages\.jsonl must be the file that was built.*Build the index again"):
            open_it()


def test_encoder_of_another_corpus_is_caught_by_the_fingerprint(saved):
    with pytest.raises(UserError, match=r"the encoder must be the one that the index in .*index was built with"):
        open_retriever(CONFIG, saved, lambda: HashEncoder().fit(["ann sings"]))


def test_a_hash_encoder_of_another_size_is_refused(saved):
    with pytest.raises(UserError, match=r"retrieval\.encoder\.dim must be 1024, .*; got 64"):
        open_retriever(RetrievalConfig(encoder=EncoderConfig(dim=64)), saved)


def test_a_retriever_shares_an_encoder_that_is_open(saved, encoder):
    asked = []

    def share():
        asked.append(True)
        return encoder

    assert len(open_retriever(CONFIG, saved, share).search(["Silver Harbor"], 2)[0]) == 2
    assert asked == [True]


def test_progress_is_told_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("r3rag_jax.retrieval.encoding.CHUNK", 100)
    told = []
    build_index(CONFIG, iter(encyclopedia()), tmp_path / "index", lambda *numbers: told.append(numbers))
    assert told == [(100, 216), (100, 216), (16, 216)]


def test_an_index_of_another_layout_or_kind_is_refused(saved):
    path = saved / "fingerprint.json"
    manifest = path.read_text()
    path.write_text('{"corpus": "x", "encoder": "x", "index": "x", "num_passages": 216, "dim": 1024}')
    for open_it in (lambda: open_retriever(CONFIG, saved), lambda: open_store(saved)):
        with pytest.raises(UserError, match=r"layout 3; got layout 1\. Remove .* and build the index again: python -m"):
            open_it()
    path.write_text(manifest.replace('"kind": "faiss"', '"kind": "other"'))
    with pytest.raises(UserError, match=r"must hold an index of retrieval\.kind=faiss; got one of other"):
        open_retriever(CONFIG, saved)
    path.write_text(manifest.replace('"num_passages"', '"passages"'))
    with pytest.raises(UserError, match=r"fingerprint\.json must have the keys of an index's fingerprint"):
        open_retriever(CONFIG, saved)

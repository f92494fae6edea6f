"""Retrieval: hash encoder, FAISS index, passage files, and the choice of what a step shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Hit, RetrievalError
from r3rag_jax.retrieval.encoders.hashed import HashEncoder, split_title, stem_of, words_of
from r3rag_jax.retrieval.faiss import FaissIndex
from r3rag_jax.retrieval.selection import corpus_fingerprint, select_passages
from r3rag_jax.types import Passage

ADJECTIVES = ("Silver", "Iron", "Golden", "Hollow", "Crimson", "Silent", "Broken", "Distant")
NOUNS = ("Harbor", "Lantern", "River", "Crown", "Garden", "Mirror", "Tower", "Voyage", "Letter")


def encyclopedia() -> list[Passage]:
    """Three passages for each of 72 films whose titles share their words: maker, setting, music."""
    contents = []
    for number, (adjective, noun) in enumerate((a, n) for a in ADJECTIVES for n in NOUNS):
        title, year = f"The {adjective} {noun}", 1930 + number
        contents += [
            f'"{title}"\n{title} is a film directed by Ann Vol{number} that came out in {year}.',
            f'"{title}"\nThe story of {title} is set in Kal{number}mouth, a harbor on the river.',
            f'"{title}"\nThe music of {title} was composed by Bo Ter{number}.',
        ]
    return [Passage(f"p{number}", content) for number, content in enumerate(contents)]


@pytest.fixture(scope="module")
def index() -> FaissIndex:
    return FaissIndex.build(encyclopedia())


def ids(hits: list[Hit]) -> list[str]:
    return [hit.passage.id for hit in hits]


class AxisEncoder:
    """A fake encoder: a text of digits is the vector with those coordinates, normalised."""

    dim = 2
    fingerprint = "axis"

    def encode(self, texts, *, kind="query"):
        vectors = np.array([[float(char) for char in text[-2:]] for text in texts], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# ---- hash encoder ----


def test_words_lose_case_accents_and_punctuation():
    assert words_of("Émile Zola's 1885 novel!") == ["emile", "zola", "s", "1885", "novel"]


@pytest.mark.parametrize(
    ("word", "stem"),
    [
        ("directed", "direct"),
        ("director", "direct"),
        ("composers", "compos"),
        ("composed", "compos"),
        ("born", "born"),
        ("used", "used"),
    ],
)
def test_stem_drops_one_suffix_and_keeps_four_letters(word, stem):
    assert stem_of(word) == stem


def test_title_is_a_first_line_in_quotes():
    assert split_title('"Ann"\nShe sings.') == ('"Ann"', "She sings.")
    assert split_title('"Ann" sings.') == ("", '"Ann" sings.')
    assert split_title("Ann\nsings.") == ("", "Ann\nsings.")


def test_vectors_are_float32_of_norm_one():
    encoder = HashEncoder(64).fit(["ann sings", "bo dances"])
    for kind in ("query", "passage"):
        vectors = encoder.encode(["ann sings", "bo"], kind=kind)
        assert vectors.dtype == np.float32
        assert vectors.shape == (2, 64)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)


def test_unknown_or_empty_query_is_the_zero_vector_and_passage_keeps_its_constant():
    encoder = HashEncoder(64).fit(["ann sings", "bo dances", "cy paints"])
    assert not encoder.encode(["", "qqqq xzxz"]).any()
    np.testing.assert_allclose(encoder.encode([""], kind="passage")[0], np.eye(64)[-1])


def test_row_depends_on_its_text_alone_whatever_was_encoded_before():
    texts = [passage.contents for passage in encyclopedia()]
    fresh, used = HashEncoder(128).fit(texts), HashEncoder(128).fit(texts)
    used.encode(texts[::-1])
    query = "who directed The Iron Lantern, and where is The Iron Lantern set?"
    np.testing.assert_array_equal(fresh.encode([query]), used.encode([texts[5], query])[1:])


def test_chunks_do_not_change_the_rows(monkeypatch):
    texts = [passage.contents for passage in encyclopedia()]
    encoder = HashEncoder(32).fit(texts)
    whole = encoder.encode(texts, kind="passage")
    monkeypatch.setattr("r3rag_jax.retrieval.encoders.hashed._CHUNK", 7)
    monkeypatch.setattr("r3rag_jax.retrieval.encoders.hashed._MAX_CACHED_WORDS", 20)
    np.testing.assert_array_equal(encoder.encode(texts, kind="passage"), whole)


def test_inner_products_estimate_the_sparse_ones_without_bias():
    # "a1 b2" and "a1 c3" share one of two equal words: cosine 1/2. Without idf, stems and trigrams
    # nothing else is left; the mean over 300 texts of their own words is the estimate.
    encoder = HashEncoder(256, stem_weight=0, trigram_weight=0)
    left = encoder.encode([f"a{i} b{i}" for i in range(300)])
    right = encoder.encode([f"a{i} c{i}" for i in range(300)])
    products = np.einsum("nd,nd->n", left, right)
    assert abs(products.mean() - 0.5) < 0.02
    unrelated = np.einsum("nd,nd->n", left[:-1], right[1:])
    assert abs(unrelated.mean()) < 0.02


def test_hash_does_not_depend_on_the_process():
    # Python's hash() of strings changes from process to process; an index lives longer than one.
    program = (
        "from r3rag_jax.retrieval.encoders.hashed import HashEncoder\n"
        "print(HashEncoder(16).encode(['silver harbor']).tobytes().hex())"
    )
    out = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
    )
    expected = HashEncoder(16).encode(["silver harbor"])
    assert out.stdout.strip() == expected.tobytes().hex()


def test_rare_name_outweighs_common_words():
    texts = [f"the man number {i} was born in the town" for i in range(50)]
    encoder = HashEncoder(1024).fit([*texts, "the Zorblax was seen"])
    scores = (
        encoder.encode(["the town where the man Zorblax was born"])
        @ encoder.encode([*texts, "the Zorblax was seen"], kind="passage").T
    )
    assert scores[0].argmax() == 50


def test_saved_encoder_loads_to_the_same_vectors_and_fingerprint(tmp_path):
    encoder = HashEncoder(64, title_weight=3.0).fit(["Émile sings", "bo dances"])
    encoder.save(tmp_path / "encoder.npz")
    loaded = HashEncoder.load(tmp_path / "encoder.npz")
    assert loaded.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(loaded.encode(["emile bo"]), encoder.encode(["emile bo"]))
    unfitted = HashEncoder(8)
    unfitted.save(tmp_path / "unfitted.npz")
    assert HashEncoder.load(tmp_path / "unfitted.npz").fingerprint == unfitted.fingerprint


def test_fingerprint_follows_settings_and_corpus():
    texts = ["ann sings", "bo dances"]
    same = {HashEncoder(64).fit(texts).fingerprint, HashEncoder(64).fit(texts[::-1]).fingerprint}
    assert len(same) == 1
    others = {
        HashEncoder(65).fit(texts).fingerprint,
        HashEncoder(64, hashes=2).fit(texts).fingerprint,
        HashEncoder(64).fit([*texts, "bo"]).fingerprint,
        HashEncoder(64).fingerprint,
    }
    assert len(others | same) == 5


def test_encoder_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(UserError, match=r"none\.npz is missing"):
        HashEncoder.load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match=r"bad\.npz"):
        HashEncoder.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(2))
    with pytest.raises(UserError, match=r"other\.npz"):
        HashEncoder.load(tmp_path / "other.npz")


def test_encoder_refuses_bad_arguments():
    with pytest.raises(ValueError, match="dim must be at least 2"):
        HashEncoder(1)
    with pytest.raises(ValueError, match="must not be negative"):
        HashEncoder(8, smoothing=-1)
    with pytest.raises(ValueError, match="at least one text"):
        HashEncoder(8).fit([])
    with pytest.raises(TypeError, match="single text 'ann'"):
        HashEncoder(8).encode("ann")
    with pytest.raises(ValueError, match="kind must be"):
        HashEncoder(8).encode(["ann"], kind="document")


# ---- index ----


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


def test_hits_are_sorted_and_their_scores_are_the_inner_products(index):
    query = "composer of The Golden Crown"
    (hits,) = index.search([query], 5)
    contents = [hit.passage.contents for hit in hits]
    expected = index.encoder.encode(contents, kind="passage") @ index.encoder.encode([query])[0]
    np.testing.assert_allclose([hit.score for hit in hits], expected, atol=1e-6)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_hits_do_not_depend_on_the_batch(index):
    # FAISS switches to matrix products from 20 queries on, which round differently.
    queries = [passage.title for passage in index.passages[:60]]
    batched = index.search(queries, 6)
    assert batched == [index.search([query], 6)[0] for query in queries]


def test_ties_go_to_the_first_passage_also_at_the_cut():
    passages = [Passage(str(number), "01") for number in range(40)]
    passages[3], passages[17] = Passage("3", "10"), Passage("17", "11")
    index = FaissIndex(AxisEncoder(), passages)
    (hits,) = index.search(["01"], 4)
    assert ids(hits) == ["0", "1", "2", "4"]
    (hits,) = index.search(["10"], 3)
    assert ids(hits) == ["3", "17", "0"]
    np.testing.assert_allclose([hit.score for hit in hits], [1.0, 0.5**0.5, 0.0], atol=1e-6)


def test_k_beyond_the_corpus_returns_all_of_it():
    index = FaissIndex(AxisEncoder(), [Passage("a", "01"), Passage("b", "10")])
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
    index = FaissIndex(BrokenEncoder(), [Passage("a", "x")])
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
        FaissIndex.build([])
    with pytest.raises(UserError, match="'a' occurs twice"):
        FaissIndex(AxisEncoder(), [Passage("a", "01"), Passage("a", "10")])


# ---- index files ----


@pytest.fixture
def saved(index, tmp_path) -> Path:
    index.save(tmp_path / "index")
    return tmp_path / "index"


def test_loaded_index_finds_the_same(index, saved):
    loaded = FaissIndex.load(saved)
    queries = ["director of The Silent Tower", "harbor"]
    assert loaded.search(queries, 5) == index.search(queries, 5)
    assert loaded.passages == index.passages
    assert loaded.fingerprint == index.fingerprint


def test_saving_replaces_the_former_index_whole_and_leaves_nothing_else(saved):
    (saved / "stale").write_text("from an older version")
    FaissIndex.build([Passage("a", '"Ann"\nAnn sings.')]).save(saved)
    assert sorted(path.name for path in saved.iterdir()) == [
        "encoder.npz",
        "fingerprint.json",
        "index.faiss",
        "passages.jsonl",
    ]
    assert [path.name for path in saved.parent.iterdir()] == ["index"]
    assert len(FaissIndex.load(saved).passages) == 1


def test_failed_save_keeps_the_former_index(index, saved, monkeypatch):
    def fail(self, path):
        raise OSError("disk full")

    monkeypatch.setattr(HashEncoder, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        FaissIndex.build([Passage("a", '"Ann"\nAnn sings.')]).save(saved)
    assert FaissIndex.load(saved).fingerprint == index.fingerprint
    assert [path.name for path in saved.parent.iterdir()] == ["index"]


@pytest.mark.parametrize("name", ["encoder.npz", "fingerprint.json", "index.faiss", "passages.jsonl"])
def test_missing_or_corrupt_file_is_named(saved, name):
    path = saved / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=name):
        FaissIndex.load(saved)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}(:| is missing)"):
        FaissIndex.load(saved)


def test_changed_passage_is_caught_by_the_fingerprint(saved):
    path = saved / "passages.jsonl"
    path.write_text(path.read_text().replace("Kal5mouth", "Kal6mouth"))
    with pytest.raises(UserError, match=r"passages\.jsonl must be the corpus"):
        FaissIndex.load(saved)


def test_encoder_of_another_corpus_is_caught_by_the_fingerprint(saved):
    with pytest.raises(UserError, match=r"encoder\.npz must be the encoder"):
        FaissIndex.load(saved, HashEncoder().fit(["ann sings"]))


def test_foreign_encoder_is_given_to_load(tmp_path):
    FaissIndex(AxisEncoder(), [Passage("a", "01"), Passage("b", "10")]).save(tmp_path / "index")
    assert not (tmp_path / "index" / "encoder.npz").exists()
    loaded = FaissIndex.load(tmp_path / "index", AxisEncoder())
    assert ids(loaded.search(["10"], 1)[0]) == ["b"]


# ---- passages ----


def test_corpus_fingerprint_sees_order_and_boundaries():
    pairs = [("a", "bc"), ("d", "e")]
    variants = [pairs, pairs[::-1], [("ab", "c"), ("d", "e")], pairs[:1]]
    prints = {corpus_fingerprint([Passage(*pair) for pair in variant]) for variant in variants}
    assert len(prints) == 4


HITS = [Hit(Passage(id, id), 1.0) for id in "abacde"]


def test_repeated_query_brings_the_next_passages():
    # The released code took the top k, then dropped what was shown: the same query brought nothing.
    first = select_passages(HITS, (), 2)
    second = select_passages(HITS, [passage.id for passage in first], 2)
    assert [passage.id for passage in first + second] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("seen", "k", "max_passages", "expected"),
    [
        ((), 3, None, "abc"),  # the second "a" counts once
        ("b", 9, None, "acde"),
        ("abcde", 2, None, ""),
        ((), 0, None, ""),
        ("xy", 4, 3, "a"),
        ("xyz", 4, 2, ""),
    ],
)
def test_select_passages(seen, k, max_passages, expected):
    chosen = select_passages(HITS, seen, k, max_passages=max_passages)
    assert "".join(passage.id for passage in chosen) == expected


def test_select_passages_refuses_a_negative_k():
    with pytest.raises(ValueError, match="k must not be negative; got -1"):
        select_passages(HITS, (), -1)

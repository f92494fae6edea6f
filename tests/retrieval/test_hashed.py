"""The hash encoder: words, vectors, fitted counts and its file."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from corpora import encyclopedia

from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.encoders.hashed import HashEncoder, split_title, stem_of, words_of


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
    encoder.save(tmp_path)
    loaded = HashEncoder.load(tmp_path / "encoder.npz")
    assert loaded.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(loaded.encode(["emile bo"]), encoder.encode(["emile bo"]))
    unfitted = HashEncoder(8)
    unfitted.save(tmp_path)
    assert HashEncoder.load(tmp_path / "encoder.npz").fingerprint == unfitted.fingerprint


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


def test_threads_that_meet_new_words_at_once_do_not_mix_their_rows():
    # Searches run in several threads; the cache of words is shared by them.
    texts = [f"word{i} other{i % 7} third{i % 11}" for i in range(400)]
    encoder = HashEncoder(64).fit(texts)
    shares, found = [texts[i::4] for i in range(4)], [[] for _ in range(4)]

    def encode(number):
        found[number] += [encoder.encode([text])[0] for text in shares[number]]

    threads = [threading.Thread(target=encode, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = HashEncoder(64).fit(texts)
    for share, rows in zip(shares, found, strict=True):
        np.testing.assert_array_equal(rows, alone.encode(share))

"""Fingerprints of corpora."""

from r3rag_jax.retrieval.fingerprint import corpus_fingerprint
from r3rag_jax.types import Passage


def test_corpus_fingerprint_sees_order_and_boundaries():
    pairs = [("a", "bc"), ("d", "e")]
    variants = [pairs, pairs[::-1], [("ab", "c"), ("d", "e")], pairs[:1]]
    prints = {corpus_fingerprint([Passage(*pair) for pair in variant]) for variant in variants}
    assert len(prints) == 4


def test_corpus_fingerprint_by_hand():
    # sha256 of "1:a2:bc", the length of each text in bytes before it
    expected = "5310a58788781ab25d5ad7c3f85035824b4eb7bdfa394e0ac2186271472b5492"
    assert corpus_fingerprint([Passage("a", "bc")]) == expected

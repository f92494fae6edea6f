"""Answers: typed-out numbers, bugs of the released code, and a plain-Python SQuAD reference."""

import collections
import random

import jax.numpy as jnp
import numpy as np
import pytest

from r3rag_jax.rewards.answer import answer_scores, encode_answers, normalize_answer


def _scores(prediction, golds):
    scores = answer_scores(encode_answers([prediction], [golds]))
    return tuple(round(float(scores[name][0]), 6) for name in ("em", "f1", "cover_em"))


def _reference_scores(prediction, golds):
    """SQuAD's metrics as its evaluation script computes them, one pair at a time."""
    best = [0.0, 0.0, 0.0]
    if prediction is None:
        return best
    for gold in golds:
        words, gold_words = normalize_answer(prediction).split(), normalize_answer(gold).split()
        em = float(words == gold_words)
        shared = sum((collections.Counter(words) & collections.Counter(gold_words)).values())
        f1 = 0.0
        if not words or not gold_words:
            f1 = em
        elif shared:
            precision, recall = shared / len(words), shared / len(gold_words)
            f1 = 2 * precision * recall / (precision + recall)
        starts = range(len(words) - len(gold_words) + 1)
        cover = any(words[s : s + len(gold_words)] == gold_words for s in starts)
        scores = em, f1, float(cover if gold_words else em)
        best = [max(old, new) for old, new in zip(best, scores, strict=True)]
    return best


def test_normalize_answer():
    assert normalize_answer("  The Eiffel-Tower,\n in  A park! ") == "eiffeltower in park"
    assert normalize_answer("Another theory an Anna") == "another theory anna"
    assert normalize_answer("The") == ""


def test_letters_at_the_ends_survive():
    # The released code cleaned answers with strip("\\n"): a backslash and the letter n, not a line
    # break. "American" was trained and graded as "America", "Darwin" as "Darwi", "nylon" as "ylo".
    assert normalize_answer("Darwin\n") == "darwin"
    assert normalize_answer("American") == "american"
    assert normalize_answer("nylon") == "nylon"
    assert _scores("American", ["America"]) == (0.0, 0.0, 0.0)
    assert _scores("Darwin", ["Darwin"]) == (1.0, 1.0, 1.0)


def test_answer_scores_typed_out():
    assert _scores("the Eiffel Tower.", ["Eiffel tower"]) == (1.0, 1.0, 1.0)
    assert _scores("Paris, in France", ["Paris"]) == (0.0, 0.5, 1.0)
    assert _scores("France, in Paris", ["Paris France"]) == (0.0, 0.8, 0.0)  # not adjacent
    assert _scores("to be", ["to to be"]) == (0.0, 0.8, 0.0)  # "to" is shared once
    assert _scores("London", ["Paris"]) == (0.0, 0.0, 0.0)
    assert _scores("parish", ["Paris"]) == (0.0, 0.0, 0.0)  # words, not letters
    assert _scores(None, ["Paris"]) == (0.0, 0.0, 0.0)
    assert _scores("", ["Paris"]) == (0.0, 0.0, 0.0)


def test_every_gold_alias_counts():
    # The released code rewarded the first alias only.
    assert _scores("NYC", ["New York City", "NYC"]) == (1.0, 1.0, 1.0)


def test_gold_without_words_is_not_in_everything():
    assert _scores("Paris", ["The"]) == (0.0, 0.0, 0.0)
    assert _scores("a!", ["The"]) == (1.0, 1.0, 1.0)
    assert _scores(None, ["The"]) == (0.0, 0.0, 0.0)


def test_answer_scores_match_squad_on_random_texts():
    rng = random.Random(0)
    vocabulary = ["a", "The", "to", "be", "York", "new", "1,000", "U.S.", "-", "née"]

    def text(most):
        return " ".join(rng.choices(vocabulary, k=rng.randint(0, most)))

    predictions = [text(9) if rng.random() > 0.1 else None for _ in range(500)]
    golds = [[text(4) for _ in range(rng.randint(1, 5))] for _ in predictions]
    scores = answer_scores(encode_answers(predictions, golds))
    expected = np.array([_reference_scores(p, g) for p, g in zip(predictions, golds, strict=True)], np.float32)
    for column, name in enumerate(("em", "f1", "cover_em")):
        assert scores[name].shape == (500,) and scores[name].dtype == jnp.float32
        np.testing.assert_allclose(scores[name], expected[:, column], rtol=1e-6, err_msg=name)
        assert 0.05 < expected[:, column].mean() < 0.95  # the texts exercise both outcomes


def test_answer_shapes_are_few_and_nothing_is_cut():
    batch = encode_answers(["one two three", None], [["x"], ["x y z u v", "y", "z"]])
    assert batch.prediction_BW.shape == (2, 4)
    assert batch.gold_BGX.shape == (2, 4, 8)
    np.testing.assert_array_equal(batch.prediction_length_B, [3, -1])
    np.testing.assert_array_equal(batch.gold_length_BG, [[1, -1, -1, -1], [5, 1, 1, -1]])
    fixed = encode_answers(["one"], [["two"]], max_golds=3, max_words=6)
    assert fixed.prediction_BW.shape == (1, 6) and fixed.gold_BGX.shape == (1, 3, 6)
    with pytest.raises(ValueError, match="at most 2 words fit, and nothing is cut; got 3"):
        encode_answers(["one two three"], [["x"]], max_words=2)
    with pytest.raises(ValueError, match="at most 1 gold answers fit, and nothing is cut; got 2"):
        encode_answers(["one"], [["x", "y"]], max_golds=1)


def test_encode_answers_refuses_bad_golds():
    with pytest.raises(ValueError, match="equal lengths; got 1 and 2"):
        encode_answers(["one"], [["x"], ["y"]])
    with pytest.raises(ValueError, match=r"golds\[1\] must be one or more gold answers; got \[\]"):
        encode_answers(["one", "two"], [["x"], []])
    with pytest.raises(ValueError, match="got 'Paris'"):  # a bare string would be five aliases
        encode_answers(["one"], ["Paris"])

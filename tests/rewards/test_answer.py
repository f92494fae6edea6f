"""Answers: typed-out numbers, bugs of the released code, and a plain-Python SQuAD reference."""

import collections
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3rag_jax.rewards import answer
from r3rag_jax.rewards.answer import AnswerBatch, answer_metrics, answer_scores, encode_answers
from r3rag_jax.rewards.normalization import normalize_answer
from r3rag_jax.types import Question, Status, Step, Trajectory


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


def test_long_gold_answers_match_squad_too():
    rng = random.Random(1)
    predictions = [" ".join(rng.choices("abcdefgh", k=rng.randint(0, 60))) for _ in range(20)]
    golds = [[" ".join(rng.choices("bcdefghi", k=rng.randint(1, 70))), "b"] for _ in predictions]
    golds[0][0], golds[1][0] = predictions[0], " ".join(predictions[1].split()[2:9])
    scores = answer_scores(encode_answers(predictions, golds))
    expected = np.array([_reference_scores(p, g) for p, g in zip(predictions, golds, strict=True)], np.float32)
    for column, name in enumerate(("em", "f1", "cover_em")):
        np.testing.assert_allclose(scores[name], expected[:, column], rtol=1e-6, err_msg=name)


def test_the_memory_grows_with_the_longest_gold_answer_and_not_with_its_square():
    # One gold answer of 256 words among 2048 predictions once asked for 13 GB.
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)  # noqa: E731
    batch = AnswerBatch(shape(2048, 256), shape(2048), shape(2048, 1, 256), shape(2048, 1))
    analysis = answer_scores.lower(batch).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 16 * 2048 * 256 * 4


def test_large_batches_are_scored_in_parts_with_the_same_result(monkeypatch):
    rng = random.Random(2)
    trajectories = []
    for i in range(50):
        golds = tuple(" ".join(rng.choices("abcd", k=rng.choice([1, 2, 40]))) for _ in range(rng.randint(1, 9)))
        step = Step("", answer=rng.choice([rng.choice(golds), "b c", ""]))
        status = Status.NO_ANSWER if i % 7 == 3 else Status.ANSWERED
        trajectories.append(Trajectory(Question("q", "?", golds), (step,), status))
    whole = answer_metrics(trajectories)
    assert 0.1 < whole["em"].mean() < 0.9 and whole["em"][3] == 0
    monkeypatch.setattr(answer, "MAX_CELLS", 1000)
    rows = answer._batches([(t.answer or "", *t.question.golden_answers) for t in trajectories])
    assert len(rows) > 5 and sorted(i for batch in rows for i in batch) == list(range(50))
    for name, values in answer_metrics(trajectories).items():
        np.testing.assert_array_equal(values, whole[name])
    assert answer_metrics([])["em"].shape == (0,)


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

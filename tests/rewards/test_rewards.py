"""Rewards: every status typed out, bugs not to repeat, and a plain-Python SQuAD reference."""

import collections
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3rag_jax.config import RewardConfig
from r3rag_jax.rewards import relevance
from r3rag_jax.rewards.answer import answer_scores, encode_answers, normalize_answer
from r3rag_jax.rewards.format import format_rewards
from r3rag_jax.rewards.scorer import score
from r3rag_jax.rewards.shaping import shape_rewards
from r3rag_jax.types import Question, Status, Step, Trajectory

# --- answers -----------------------------------------------------------------------------------


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


# --- format and relevance ----------------------------------------------------------------------


def test_format():
    malformed_BK = jnp.array([[False, True, True]])
    rewards_BK = format_rewards(jnp.array([[0.1, 5.0, 0.0]]), malformed_BK, -0.9)
    np.testing.assert_allclose(rewards_BK, [[0.1, -0.9, -0.9]])


def test_gold_recall():
    retrieved_BKP = jnp.array(
        [
            [[7, 1], [1, 7], [3, 2], [2, 5]],  # new 1; nothing new; new 2; 2 again
            [[1, 2], [3, 4], [5, 6], [9, -1]],  # both golds at once, then none; padding is no gold
            [[5, -1], [8, -1], [-1, -1], [1, 1]],  # the last step was not taken
        ]
    )
    gold_BG = jnp.array([[1, 2], [1, 2], [1, -1]])
    step_mask_BK = jnp.array([[True] * 4, [True] * 4, [True, True, True, False]])
    np.testing.assert_array_equal(
        relevance.gold_recall(retrieved_BKP, gold_BG, step_mask_BK),
        [[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
    )
    assert relevance.gold_recall(retrieved_BKP, gold_BG, step_mask_BK).dtype == jnp.float32


def test_embedding_similarity():
    query_BKD = jnp.array([[[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    docs_BKPD = jnp.array(
        [
            [
                [[3.0, 4.0], [0.0, 1.0]],  # cosines 0.6 and 0
                [[-1.0, 0.0], [-1.0, 1.0]],  # both negative: clipped to 0
                [[1.0, 0.0], [0.8, 0.6]],  # the best is masked: 0.8
                [[1.0, 0.0], [1.0, 1.0]],  # a zero query
            ]
        ]
    )
    doc_mask_BKP = jnp.ones((1, 4, 2), bool).at[0, 2, 0].set(False)
    process_BK = relevance.embedding_similarity(query_BKD, docs_BKPD, doc_mask_BKP)
    np.testing.assert_allclose(process_BK, [[0.6, 0.0, 0.8, 0.0]], rtol=1e-6)
    no_docs = relevance.embedding_similarity(query_BKD, docs_BKPD, jnp.zeros((1, 4, 2), bool))
    np.testing.assert_array_equal(no_docs, np.zeros((1, 4)))


def test_embedding_similarity_is_in_tenths():
    angles = jnp.linspace(0, np.pi / 2, 50)
    docs_BKPD = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)[None, :, None, :]
    query_BKD = jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, 50, 2))
    process_BK = relevance.embedding_similarity(query_BKD, docs_BKPD, jnp.ones((1, 50, 1), bool))
    np.testing.assert_allclose(np.unique(process_BK), np.arange(11) / 10, rtol=1e-6)


# --- shaping -----------------------------------------------------------------------------------

# One trajectory per row, three steps unless said otherwise; relevance 0.5 on the first, 1 on the
# second.
NAMES = ("correct", "wrong", "no answer", "format error", "two steps, correct", "malformed inside")
INPUTS = {
    "process_BK": [
        [0.5, 1.0, 0.0],
        [0.5, 1.0, 0.0],
        [0.5, 1.0, 0.7],
        [0.5, 1.0, 0.0],
        [0.5, 0.0, 9.9],
        [0.5, 0.3, 0.0],
    ],
    "correct_B": [1.0, 0.0, 0.0, 0.0, 1.0, 1.0],
    "status_B": [
        Status.ANSWERED,
        Status.ANSWERED,
        Status.NO_ANSWER,
        Status.FORMAT_ERROR,
        Status.ANSWERED,
        Status.ANSWERED,
    ],
    "step_mask_BK": [[True] * 3] * 4 + [[True, True, False], [True] * 3],
    "malformed_BK": [[False] * 3] * 3 + [[False, False, True], [False, False, True], [False, True, False]],
}
TABLE = {
    "r3": [
        [0.8, 1.6, 2.0],
        [0.4, 0.8, 0.0],
        [0.4, 0.8, -0.5],
        [0.4, 0.8, -1.0],
        [0.8, 2.0, 0.0],
        [0.8, -1.0, 2.0],
    ],
    "paper": [
        [0.8, 1.6, 2.0],
        [0.4, 0.8, 0.0],
        [0.45, 0.9, 0.63],
        [0.5, 1.0, -0.9],
        [0.8, 2.0, 0.0],
        [0.8, -0.9, 2.0],
    ],
    "r3, outcome only": [
        [0.0, 0.0, 2.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, -0.5],
        [0.0, 0.0, -1.0],
        [0.0, 2.0, 0.0],
        [0.0, -1.0, 2.0],
    ],
    "paper, outcome only": [
        [2.0, 2.0, 2.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, -0.9],
        [2.0, 2.0, 0.0],
        [2.0, -0.9, 2.0],
    ],
    "r3, process only": [
        [0.5, 1.0, 0.0],
        [0.5, 1.0, 0.0],
        [0.5, 1.0, 0.7],
        [0.5, 1.0, -1.0],
        [0.5, 0.0, 0.0],
        [0.5, -1.0, 0.0],
    ],
}
OPTIONS = {
    "r3": {},
    "paper": {"compat": "paper"},
    "r3, outcome only": {"use_process": False},
    "paper, outcome only": {"compat": "paper", "use_process": False},
    "r3, process only": {"use_outcome": False},
}


def _inputs(**changes):
    return {name: jnp.asarray(value) for name, value in (INPUTS | changes).items()}


def _no_answer_and_wrong(process_BK, step_mask_BK, malformed_BK, **options):
    """Total the same steps ended by a search that leads nowhere, and by a wrong answer: 2 x [B]."""
    num_rows = len(process_BK)
    rewards_BK = shape_rewards(
        np.concatenate([process_BK] * 2),
        np.zeros(2 * num_rows, np.float32),
        np.repeat([Status.NO_ANSWER, Status.ANSWERED], num_rows),
        np.concatenate([step_mask_BK] * 2),
        np.concatenate([malformed_BK] * 2),
        **options,
    )
    return np.asarray(rewards_BK).sum(axis=1).reshape(2, num_rows)


@pytest.mark.parametrize("variant", TABLE)
def test_shape_rewards_typed_out_jitted_eager_vmapped(variant):
    shape = functools.partial(shape_rewards, **OPTIONS[variant])
    rewards_BK = shape(**_inputs())
    for name, row, expected in zip(NAMES, rewards_BK, TABLE[variant], strict=True):
        np.testing.assert_allclose(row, expected, rtol=1e-6, atol=1e-7, err_msg=name)
    with jax.disable_jit():
        np.testing.assert_allclose(shape(**_inputs()), rewards_BK, rtol=1e-6)
    stacked = {name: jnp.stack([value, value[::-1]]) for name, value in _inputs().items()}
    twice = jax.vmap(lambda kwargs: shape(**kwargs))(stacked)
    np.testing.assert_allclose(twice, [rewards_BK, rewards_BK[::-1]], rtol=1e-6)


def test_a_tenth_stays_a_tenth():
    # A peer collected rewards in an int32 array, where 0.7 became 0: the model learnt nothing from
    # most of them.
    inputs = _inputs(process_BK=[[0.1] * 3] * 6)
    rewards_BK = shape_rewards(**inputs, factor_wrong=1.0)
    assert rewards_BK.dtype == jnp.float32
    assert rewards_BK[NAMES.index("wrong"), 0] == np.float32(0.1)
    # Even whole-number relevances and matches, given as integers, are scaled as floats.
    integers = _inputs(process_BK=[[1] * 3] * 6, correct_B=[1, 0, 0, 0, 1, 1])
    assert shape_rewards(**integers)[NAMES.index("correct"), 0] == np.float32(1.6)


def test_f1_as_outcome():
    inputs = _inputs(correct_B=[0.75, 0.25, 1.0, 1.0, 0.5, 0.0])
    rewards_BK = shape_rewards(**inputs)
    np.testing.assert_allclose(rewards_BK[0], [0.8, 1.6, 1.5], rtol=1e-6)
    np.testing.assert_allclose(rewards_BK[1], [0.4, 0.8, 0.5], rtol=1e-6)
    np.testing.assert_allclose(rewards_BK[2], [0.4, 0.8, -0.5], rtol=1e-6)  # no answer, no outcome
    np.testing.assert_allclose(rewards_BK[4], [0.8, 1.0, 0.0], rtol=1e-6)


def test_rewards_are_clipped():
    rewards_BK = shape_rewards(**_inputs(), outcome_weight=50.0, malformed_reward=-30.0, no_answer_penalty=20.0)
    assert rewards_BK[0, 2] == 10.0 and rewards_BK[3, 2] == -10.0 and rewards_BK[2, 2] == -10.0
    assert shape_rewards(**_inputs(), clip=0.25)[0, 0] == 0.25


@pytest.mark.parametrize("options", [{}, {"use_process": False}, {"factor_wrong": 0.95}])
def test_never_answering_totals_less_than_answering_wrongly(options):
    rng = np.random.default_rng(0)
    num_rows, num_steps = 2000, 10
    process_BK = rng.integers(0, 11, (num_rows, num_steps)).astype(np.float32) / 10
    steps_B = rng.integers(1, num_steps + 1, num_rows)
    step_mask_BK = np.arange(num_steps) < steps_B[:, None]
    malformed_BK = rng.random((num_rows, num_steps)) < 0.2
    malformed_BK[np.arange(num_rows), steps_B - 1] = False  # the searches and answers compared
    never, wrong = _no_answer_and_wrong(process_BK, step_mask_BK, malformed_BK, **options)
    assert np.all(never < wrong)


def test_paper_shaping_prefers_never_answering():
    # In the paper a wrong answer scales the process rewards by 0.8 and adds nothing, no answer by
    # 0.9, and its last search is rewarded too: 0.9 * (0.5 + 1 + 0.7) = 1.98 against 0.8 * (0.5 + 1)
    # = 1.2. A policy unsure of its answer learns to search until the budget is gone.
    steps = np.array([[0.5, 1.0, 0.7]], np.float32), np.ones((1, 3), bool), np.zeros((1, 3), bool)
    never, wrong = _no_answer_and_wrong(*steps, compat="paper")
    np.testing.assert_allclose(never, [1.98], rtol=1e-6)
    np.testing.assert_allclose(wrong, [1.2], rtol=1e-6)
    never, wrong = _no_answer_and_wrong(*steps)
    np.testing.assert_allclose(never, [0.7], rtol=1e-6)
    np.testing.assert_allclose(wrong, [1.2], rtol=1e-6)


def test_malformed_reward_can_be_set_in_either_compat():
    for compat in ("r3", "paper"):
        rewards_BK = shape_rewards(**_inputs(), compat=compat, malformed_reward=-0.3)
        np.testing.assert_allclose(rewards_BK[3, 2], -0.3, rtol=1e-6)


def test_unknown_compat():
    with pytest.raises(ValueError, match=r"rewards.compat must be r3 or paper; got 'r2'"):
        shape_rewards(**_inputs(), compat="r2")


@pytest.mark.parametrize(("status", "reward"), [(Status.NO_ANSWER, -0.5), (Status.FORMAT_ERROR, -1.0)])
def test_a_step_cut_off_by_the_budget_of_all_steps_broke_no_rule(status, reward):
    question = Question("q", "Who?", ("Ada",), {"supporting_ids": ["a"]})
    steps = Step("hm", query="who"), Step("so it m", is_well_formed=False)
    [rewards] = score([Trajectory(question, steps, status, ())], RewardConfig(), None, max_steps=2).rewards
    np.testing.assert_allclose(rewards, [0, reward])

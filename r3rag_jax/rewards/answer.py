"""Outcome rewards `em`, `f1`, `cover_em`: exact match, F1 and cover exact match after SQuAD normalisation.

The best gold answer (alias) of a question counts. The host turns text into padded word ids; one jitted function of the
ids computes all three. docs/evaluation.md compares the definitions with those of other projects.
Shape suffixes: B questions, G gold answers, W words of a prediction, X words of a gold answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from r3rag_jax.rewards.base import Resources, next_power_of_two
from r3rag_jax.rewards.normalization import normalize_answer
from r3rag_jax.types import Trajectory

_PREDICTION_PAD, _GOLD_PAD = -1, -2  # unequal, so that padding never matches padding
MAX_CELLS = 1 << 22  # of a padded array of word ids, [B, G, X]: more rows are scored in several batches
_VECTORISED_WORDS = 32  # a gold answer of more words is compared word by word: memory then grows with X, not with X^2
_NO_ANSWER = -1  # length of a missing prediction or gold answer; 0 is a text without words, such as "The"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AnswerBatch:
    """Predictions and gold answers as ids of normalised words; the ids have a meaning within this batch only."""

    prediction_BW: jax.Array | np.ndarray  # int32 [B, W], right-padded with -1
    prediction_length_B: jax.Array | np.ndarray  # int32 [B], words; -1 = no prediction
    gold_BGX: jax.Array | np.ndarray  # int32 [B, G, X], right-padded with -2
    gold_length_BG: jax.Array | np.ndarray  # int32 [B, G], words; -1 = no such gold answer


def em_rewards(trajectories: Sequence[Trajectory], resources: Resources) -> np.ndarray:
    """Exact match of the final answers, float32 [B]."""
    return _metrics(trajectories, resources)["em"]


def f1_rewards(trajectories: Sequence[Trajectory], resources: Resources) -> np.ndarray:
    """F1 of the final answers' words, float32 [B]."""
    return _metrics(trajectories, resources)["f1"]


def cover_em_rewards(trajectories: Sequence[Trajectory], resources: Resources) -> np.ndarray:
    """Cover exact match of the final answers, float32 [B]."""
    return _metrics(trajectories, resources)["cover_em"]


def _metrics(trajectories: Sequence[Trajectory], resources: Resources) -> dict[str, np.ndarray]:
    return answer_metrics(trajectories) if resources.answers is None else resources.answers


def answer_metrics(trajectories: Sequence[Trajectory]) -> dict[str, np.ndarray]:
    """`answer_scores` (em, f1, cover_em) of the final answers over all gold answers, float32 [B]; 0 without an answer.

    The jitted part gets batches of at most MAX_CELLS padded word ids, whose B is a power of two.
    """
    found = {name: np.zeros(len(trajectories), np.float32) for name in ("em", "f1", "cover_em")}
    for rows in _batches([(t.answer or "", *t.question.golden_answers) for t in trajectories]):
        padding = next_power_of_two(len(rows)) - len(rows)
        predictions = [trajectories[i].answer for i in rows] + [None] * padding
        golds: list[Sequence[str]] = [trajectories[i].question.golden_answers for i in rows]
        scores = answer_scores(encode_answers(predictions, golds + [("",)] * padding))
        for name, values in scores.items():
            found[name][rows] = np.asarray(values)[: len(rows)]
    return found


def _batches(texts: Sequence[Sequence[str]]) -> list[list[int]]:
    """Indices of the rows of each batch: one of all rows, or, if they are too large, several of similar sizes.

    `texts` are the prediction and the gold answers of each row. A text has at most (characters + 1) / 2 words.
    """
    shapes = [(len(row) - 1, max((len(text) + 1) // 2 for text in row)) for row in texts]

    def num_cells(rows: Sequence[int]) -> int:
        counts = len(rows), max(shapes[i][0] for i in rows), max(shapes[i][1] for i in rows)
        return math.prod(map(next_power_of_two, counts))

    everything = list(range(len(texts)))
    if not everything or num_cells(everything) <= MAX_CELLS:
        return [everything] if everything else []
    batches: list[list[int]] = [[]]
    for i in sorted(everything, key=lambda i: math.prod(shapes[i])):
        if batches[-1] and num_cells([*batches[-1], i]) > MAX_CELLS:
            batches.append([])
        batches[-1].append(i)
    return batches


def encode_answers(
    predictions: Sequence[str | None],
    golds: Sequence[Sequence[str]],
    *,
    max_golds: int | None = None,
    max_words: int | None = None,
) -> AnswerBatch:
    """Texts as word ids; G, W and X are padded to powers of two, so that few shapes are compiled.

    Args:
        predictions: B texts, None where a trajectory has no answer.
        golds: the gold answers (aliases) of each, at least one.
        max_golds: G, instead of a power of two.
        max_words: W and X, instead of powers of two.

    Returns:
        An AnswerBatch of numpy arrays; B is not padded.

    Raises:
        ValueError: the lists differ in length, a question has no gold answer, or max_golds or max_words is too small:
            nothing is cut.
    """
    if len(predictions) != len(golds):
        raise ValueError(f"predictions and golds must have equal lengths; got {len(predictions)} and {len(golds)}")
    vocabulary: dict[str, int] = {}
    cache: dict[str, list[int]] = {}  # samples of one question share their gold answers

    def word_ids(text: str) -> list[int]:
        ids = cache.get(text)
        if ids is None:
            words = normalize_answer(text).split()
            ids = cache[text] = [vocabulary.setdefault(word, len(vocabulary)) for word in words]
        return ids

    prediction_ids = [None if text is None else word_ids(text) for text in predictions]
    gold_ids = []
    for row, aliases in enumerate(golds):
        if isinstance(aliases, str) or not aliases:
            raise ValueError(f"golds[{row}] must be one or more gold answers; got {aliases!r}")
        gold_ids.append([word_ids(alias) for alias in aliases])

    num_golds = _padded_size("gold answers", max(map(len, gold_ids), default=1), max_golds)
    longest_gold = max((len(ids) for row_ids in gold_ids for ids in row_ids), default=1)
    longest_prediction = max((len(ids) for ids in prediction_ids if ids is not None), default=1)
    batch = len(predictions)
    prediction_BW, prediction_length_B = _pad(
        prediction_ids, _padded_size("words", longest_prediction, max_words), _PREDICTION_PAD
    )
    slots = [ids for row in gold_ids for ids in [*row, *[None] * (num_golds - len(row))]]
    gold_RX, gold_length_R = _pad(slots, _padded_size("words", longest_gold, max_words), _GOLD_PAD)
    return AnswerBatch(
        prediction_BW=prediction_BW,
        prediction_length_B=prediction_length_B,
        gold_BGX=gold_RX.reshape(batch, num_golds, gold_RX.shape[1]),
        gold_length_BG=gold_length_R.reshape(batch, num_golds),
    )


def _padded_size(what: str, needed: int, fixed: int | None) -> int:
    if fixed is None:
        return next_power_of_two(needed)
    if needed > fixed:
        raise ValueError(f"at most {fixed} {what} fit, and nothing is cut; got {needed}")
    return fixed


def _pad(rows: Sequence[list[int] | None], width: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows as an array int32 [R, width], right-padded, and their lengths int32 [R], -1 for None."""
    ids_RW = np.full((len(rows), width), pad, np.int32)
    for row, ids in enumerate(rows):
        if ids:
            ids_RW[row, : len(ids)] = ids
    lengths = [_NO_ANSWER if ids is None else len(ids) for ids in rows]
    return ids_RW, np.asarray(lengths, np.int32)


@jax.jit
def answer_scores(batch: AnswerBatch) -> dict[str, jax.Array]:
    """Exact match, F1 and cover exact match of each prediction, the maximum over its gold answers.

    F1 = 2 o / (n_prediction + n_gold), where o is the size of the multiset of shared words. Cover exact match is 1 if
    the words of a gold answer occur in the prediction in order and without a gap. A gold answer without words (all
    articles or punctuation) matches only a prediction without words, as in SQuAD 2.0. A missing prediction scores 0.

    Returns:
        {"em", "f1", "cover_em"}, each float32 [B] in [0, 1].
    """
    score_prediction = jax.vmap(_score_pair, in_axes=(None, None, 0, 0))
    scores_BG = jax.vmap(score_prediction)(
        batch.prediction_BW, batch.prediction_length_B, batch.gold_BGX, batch.gold_length_BG
    )
    return {name: jnp.max(score_BG, axis=1) for name, score_BG in scores_BG.items()}


def _score_pair(prediction_W, prediction_length, gold_X, gold_length):
    """Score one prediction against one gold answer."""
    width, gold_width = prediction_W.shape[0], gold_X.shape[0]
    valid = (prediction_length >= 0) & (gold_length >= 0)

    # starts_W[s]: does the gold answer start at word s of the prediction? One gold word is compared at a time.
    padded = jnp.pad(prediction_W, (0, gold_width), constant_values=_PREDICTION_PAD)

    def match_word(x, starts_W):
        same_W = lax.dynamic_slice_in_dim(padded, x, width) == gold_X[x]
        return starts_W & (same_W | (x >= gold_length))

    starts_W = lax.fori_loop(0, gold_width, match_word, jnp.ones(width, bool))
    both_empty = (prediction_length == 0) & (gold_length == 0)
    cover_em = jnp.where(gold_length > 0, jnp.any(starts_W), both_empty)
    em = starts_W[0] & (prediction_length == gold_length)

    shared = _num_shared(prediction_W, gold_X)
    f1 = jnp.where(both_empty, 1.0, 2 * shared / jnp.maximum(prediction_length + gold_length, 1))
    return {
        "em": jnp.where(valid, em, False).astype(jnp.float32),
        "f1": jnp.where(valid, f1, 0.0),
        "cover_em": jnp.where(valid, cover_em, False).astype(jnp.float32),
    }


def _num_shared(prediction_W, gold_X):
    """Size of the multiset of shared words: the k-th "to" of the gold answer is shared if there are k of them."""
    num_words = gold_X.shape[0]
    if num_words <= _VECTORISED_WORDS:
        rank_X = jnp.sum(jnp.tril(gold_X[:, None] == gold_X[None, :]), axis=1)
        available_X = jnp.sum(gold_X[:, None] == prediction_W[None, :], axis=1)
        return jnp.sum(rank_X <= available_X, dtype=jnp.float32)

    def add_word(x, shared):
        rank = jnp.sum((gold_X == gold_X[x]) & (jnp.arange(num_words) <= x))
        return shared + (rank <= jnp.sum(prediction_W == gold_X[x]))

    return lax.fori_loop(0, num_words, add_word, jnp.float32(0))

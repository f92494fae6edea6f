"""Comparisons of a prediction's text with gold answers as other projects define them; each takes one pair of texts."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from r3rag_jax.rewards.normalization import normalize_answer

_CLOSED_ANSWERS = ("yes", "no", "noanswer")  # of which a part earns nothing
CACHED_PASSAGES = 1 << 14  # the same passages are retrieved for many questions


class Overlap(NamedTuple):
    """Of the words of a prediction and a gold answer."""

    f1: float
    precision: float
    recall: float


def hotpot_overlap(prediction: str, golds: Sequence[str]) -> Overlap:
    """Overlap of words as HotpotQA's evaluation script has it, each number the maximum over gold answers.

    Where prediction or gold answer is yes, no or noanswer, and they differ, all is 0: "yes" shares a word with "yes,
    both", and nothing counts. Two texts without words share none.
    """
    pairs = [_overlap(normalize_answer(prediction), normalize_answer(gold)) for gold in golds]
    return Overlap(*map(max, zip(*pairs, strict=True)))


def _overlap(prediction: str, gold: str) -> Overlap:
    words, gold_words = prediction.split(), gold.split()
    shared = sum((Counter(words) & Counter(gold_words)).values())
    is_closed = prediction in _CLOSED_ANSWERS or gold in _CLOSED_ANSWERS
    if shared == 0 or (is_closed and prediction != gold):
        return Overlap(0.0, 0.0, 0.0)
    precision, recall = shared / len(words), shared / len(gold_words)
    return Overlap(2 * precision * recall / (precision + recall), precision, recall)


def contains_characters(text: str, golds: Sequence[str]) -> bool:
    """Whether a gold answer is a substring of the text's characters, both normalised: "us" is one of "Russia".

    An answer without words, such as "The", is a substring of every text.
    """
    normal = _normalize(text)
    return any(normalize_answer(gold) in normal for gold in golds)


def contains_words(text: str, words: str) -> bool:
    """Whether the words occur in the text in order and without a gap, both normalised; no words occur nowhere."""
    inner = normalize_answer(words)
    return bool(inner) and f" {inner} " in f" {_normalize(text)} "


# A passage is compared with the answers of every question that it was retrieved for.
_normalize = functools.lru_cache(CACHED_PASSAGES)(normalize_answer)

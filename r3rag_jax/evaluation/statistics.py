"""Confidence intervals, and tests of whether two systems differ on the same questions.

Shares of questions have Wilson's interval: it keeps its 95 % for few questions and near 0 and 100 %, where the
textbook interval (p ± 1.96 s) claims certainty, and it never leaves [0, 1]. Everything else (F1, counts, tokens per
correct answer, means over samples) has the percentile bootstrap over *questions*, because the samples of a question are
not independent. Two systems are compared question by question: a difference has a much smaller error than the two
intervals suggest, since both fail on the same hard questions. Q questions, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

Z_95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval
NUM_RESAMPLES = 2000
NUM_FLIPS = 10_000
_CHUNK = 1 << 22  # resampled weights that are in memory at once
Interval = tuple[float, float]
Statistic = Callable[[np.ndarray], np.ndarray]  # weights [R, Q] of the questions -> [R]


def wilson(num_correct: float, num: int) -> Interval:
    """Wilson's score interval of a share, 95 % (Wilson 1927; Brown, Cai, DasGupta 2001).

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    """
    share, z2 = num_correct / num, Z_95**2
    centre = share + z2 / (2 * num)
    reach = Z_95 * math.sqrt(share * (1 - share) / num + z2 / (4 * num**2))
    low, high = (centre - reach) / (1 + z2 / num), (centre + reach) / (1 + z2 / num)
    return max(0.0, low), min(1.0, high)


def bootstrap(statistics: Mapping[str, Statistic], num: int, *, seed: int = 0) -> dict[str, Interval]:
    """Percentile bootstrap intervals, 95 %, of statistics of `num` questions (Efron, Tibshirani 1993, chapter 13).

    Args:
        statistics: each gets how often each question was drawn, float64 [R, Q], and returns [R]; NaN is left out. All
            get the same draws.
    """
    if not statistics:
        return {}
    rng = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    for count in _chunks(NUM_RESAMPLES, num):
        weights_RQ = rng.multinomial(num, np.full(num, 1 / num), size=count).astype(np.float64)
        for name, statistic in statistics.items():
            found[name].append(statistic(weights_RQ))
    return {name: _middle(np.concatenate(values)) for name, values in found.items()}


def _middle(values_R: np.ndarray) -> Interval:
    known = values_R[np.isfinite(values_R)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def _chunks(count: int, width: int) -> Iterator[int]:
    """`count` rows of `width` numbers, in chunks of at most _CHUNK numbers: the rows of each."""
    rows = max(1, _CHUNK // max(1, width))
    for start in range(0, count, rows):
        yield min(rows, count - start)


def weighted_mean(values_Q: np.ndarray) -> Statistic:
    """The mean of the known values of the questions that were drawn."""
    known_Q = np.isfinite(values_Q).astype(np.float64)
    filled_Q = np.where(known_Q > 0, values_Q, 0.0)

    def mean(weights_RQ: np.ndarray) -> np.ndarray:
        count = weights_RQ @ known_Q
        return np.where(count > 0, weights_RQ @ filled_Q / np.maximum(count, 1), np.nan)

    return mean


def weighted_ratio(numerator_Q: np.ndarray, denominator_Q: np.ndarray) -> Statistic:
    """The ratio of two sums over the questions that were drawn; NaN where the denominator is 0."""

    def ratio(weights_RQ: np.ndarray) -> np.ndarray:
        total = weights_RQ @ denominator_Q
        return np.where(total > 0, weights_RQ @ numerator_Q / np.where(total > 0, total, 1), np.nan)

    return ratio


def mcnemar(one_Q: np.ndarray, other_Q: np.ndarray) -> float:
    """Exact two-sided p value of McNemar's test for values 0 and 1 of the same questions.

    Of the questions that one alone gets right, as many should be either's: twice the binomial tail with p = 1/2.
    """
    only_one, only_other = int(np.sum(one_Q > other_Q)), int(np.sum(other_Q > one_Q))
    num = only_one + only_other
    term = tail = 1
    for i in range(1, min(only_one, only_other) + 1):
        term = term * (num - i + 1) // i
        tail += term
    return min(1.0, 2 * tail / 2**num)  # of integers, which no size overflows


def sign_flips(one_Q: np.ndarray, other_Q: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p value of the paired permutation test of a difference of means (Fisher 1935).

    Without a difference of the systems, a question's two values could as well be swapped: how often is the mean
    difference after random swaps at least as large as the one seen? (count + 1) / (NUM_FLIPS + 1), never 0.
    """
    difference_Q = one_Q - other_Q
    difference_Q = difference_Q[difference_Q != 0]
    if not len(difference_Q):
        return 1.0
    rng, seen = np.random.default_rng(seed), abs(difference_Q.sum())
    count = 0
    for rows in _chunks(NUM_FLIPS, len(difference_Q)):
        signs = rng.integers(0, 2, size=(rows, len(difference_Q)), dtype=np.int8)
        totals = (2.0 * signs - 1.0) @ difference_Q
        count += int(np.sum(np.abs(totals) >= seen * (1 - 1e-12)))
    return (count + 1) / (NUM_FLIPS + 1)

"""Intervals and tests: against scipy, against published numbers, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from r3rag_jax.evaluation.statistics import (
    bootstrap,
    mcnemar,
    sign_flips,
    weighted_mean,
    weighted_ratio,
    wilson,
)


@pytest.mark.parametrize(("correct", "num"), [(0, 1), (0, 20), (1, 1), (3, 7), (61, 400), (400, 400), (4523, 7405)])
def test_wilson_is_scipys(correct: int, num: int) -> None:
    expected = stats.binomtest(correct, num).proportion_ci(method="wilson")
    assert wilson(correct, num) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_covers_where_the_textbook_interval_does_not() -> None:
    """Chance that the interval of 50 questions holds a true share of 2 %: the binomial sum, no simulation."""
    num, share = 50, 0.02
    chances = stats.binom.pmf(np.arange(num + 1), num, share)
    held = np.asarray([wilson(k, num)[0] <= share <= wilson(k, num)[1] for k in range(num + 1)])
    p = np.arange(num + 1) / num
    textbook = abs(p - share) <= 1.96 * np.sqrt(p * (1 - p) / num)
    assert chances @ held > 0.92 and chances @ textbook < 0.65


def test_the_bootstrap_is_scipys_within_its_noise() -> None:
    values = np.random.default_rng(3).gamma(2.0, 50.0, 300)
    low, high = bootstrap({"x": weighted_mean(values)}, len(values))["x"]
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    width = expected.high - expected.low
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.08 * width)


def test_the_bootstrap_resamples_questions() -> None:
    """Unknown values are left out, a ratio is of sums, and draws are shared and repeatable."""
    values = np.asarray([1.0, np.nan, 3.0, np.nan])
    weights = np.asarray([[1.0, 2.0, 1.0, 0.0], [0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 4.0, 0.0]])
    np.testing.assert_array_equal(weighted_mean(values)(weights), [2.0, np.nan, 3.0])
    tokens, correct = np.asarray([10.0, 20.0, 30.0, 40.0]), np.asarray([1.0, 0.0, 1.0, 0.0])
    np.testing.assert_array_equal(weighted_ratio(tokens, correct)(weights), [40.0, np.nan, 30.0])
    both = bootstrap({"a": weighted_mean(tokens), "b": weighted_mean(2 * tokens)}, 4)
    assert both["b"] == pytest.approx(tuple(2 * bound for bound in both["a"]))
    assert bootstrap({"a": weighted_mean(tokens)}, 4)["a"] == both["a"]
    nothing = bootstrap({"x": weighted_mean(np.full(3, np.nan))}, 3)["x"]
    assert np.isnan(nothing).all() and bootstrap({}, 3) == {}


def pair(only_one: int, only_other: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    one = np.repeat([1.0, 0.0, 1.0, 0.0], [only_one, only_other, both, neither])
    other = np.repeat([0.0, 1.0, 1.0, 0.0], [only_one, only_other, both, neither])
    return one, other


@pytest.mark.parametrize(("only_one", "only_other"), [(0, 0), (1, 0), (19, 11), (0, 12), (45, 12), (900, 1100)])
def test_mcnemar_is_the_exact_binomial_test(only_one: int, only_other: int) -> None:
    num = only_one + only_other
    expected = stats.binomtest(only_one, num, 0.5).pvalue if num else 1.0
    assert mcnemar(*pair(only_one, only_other, 5, 7)) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(*pair(only_other, only_one, 0, 0)) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_typed_out() -> None:
    assert mcnemar(*pair(3, 0, 9, 9)) == 0.25  # 2 (1/2)^3
    assert mcnemar(*pair(1, 3, 0, 0)) == 0.625  # 2 (1 + 4) / 16
    assert mcnemar(*pair(19, 11, 27, 43)) == pytest.approx(0.2005, abs=1e-4)


def test_sign_flips_are_scipys_permutation_test() -> None:
    rng = np.random.default_rng(5)
    one = rng.random(60)
    other = one + rng.normal(0.03, 0.1, 60)
    result = stats.permutation_test(
        (one, other), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=20_000, rng=2
    )
    assert sign_flips(one, other) == pytest.approx(result.pvalue, abs=0.02)
    assert sign_flips(one, other) == sign_flips(other, one)
    assert sign_flips(one, one) == 1.0


def test_sign_flips_of_few_differences_are_exact_within_noise() -> None:
    """Three differences of one sign: two of the eight sign patterns are as extreme."""
    assert sign_flips(np.asarray([1.0, 2.0, 3.0, 4.0]), np.asarray([0.0, 0.0, 0.0, 4.0])) == pytest.approx(
        0.25, abs=0.02
    )
    far = sign_flips(np.arange(40.0) + 1, np.zeros(40))
    assert 0 < far < 1e-3


def test_p_values_of_equal_systems_are_not_small_too_often() -> None:
    rng = np.random.default_rng(0)
    small = 0
    for _ in range(200):
        one, other = rng.random((2, 40)) < 0.5
        small += mcnemar(one.astype(float), other.astype(float)) < 0.05
    assert small <= 18  # 5 % of 200, and three standard errors; the exact test is below it

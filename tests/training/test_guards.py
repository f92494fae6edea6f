"""Guards: each threshold at its edge, patience, what resuming needs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from r3rag_jax.config import ConfigError, GuardsConfig, RLConfig
from r3rag_jax.training.guards import Guards, is_finite
from r3rag_jax.training.rollout_metrics import repeated_query_rate
from r3rag_jax.types import Question, Status, Step, Trajectory

CALM = {
    "approx_kl": 0.01, "kl": 0.1, "clip_fraction": 0.1, "entropy": 0.5, "no_answer_rate": 0.2, "equal_groups": 0.5,
    "format_error_rate": 0.1, "repeated_query_rate": 0.1, "trajectory_tokens": 50.0, "displacement": -0.01,
}  # fmt: skip
RLOO = RLConfig(algorithm="rloo")


def guards(**thresholds: Any) -> Guards:
    return Guards(GuardsConfig(**thresholds), RLOO)


@pytest.mark.parametrize(
    ("threshold", "metrics", "told"),
    [
        ({"approx_kl": 0.02}, {"approx_kl": 0.03}, "approx_kl must be at most 0.02 (guards.approx_kl); got 0.03"),
        ({"kl": 0.2}, {"kl": 0.21}, "kl must be at most 0.2 (guards.kl); got 0.21"),
        ({"clip_fraction": 0.2}, {"clip_fraction": 0.3},
         "clip_fraction must be at most 0.2 (guards.clip_fraction); got 0.3"),
        ({"min_entropy": 0.4}, {"entropy": 0.3}, "entropy must be at least 0.4 (guards.min_entropy); got 0.3"),
        ({"max_entropy": 2.0}, {"entropy": 3.0}, "entropy must be at most 2.0 (guards.max_entropy); got 3"),
        ({"no_answer_rate": 0.5}, {"no_answer_rate": 0.75},
         "no_answer_rate must be at most 0.5 (guards.no_answer_rate); got 0.75"),
        ({"format_error_rate": 0.5}, {"format_error_rate": 0.75},
         "format_error_rate must be at most 0.5 (guards.format_error_rate); got 0.75"),
        ({"repeated_query_rate": 0.5}, {"repeated_query_rate": 0.75},
         "repeated_query_rate must be at most 0.5 (guards.repeated_query_rate); got 0.75"),
        ({"equal_groups": 0.9}, {"equal_groups": 1.0},
         "equal_groups must be at most 0.9 (guards.equal_groups); got 1"),
        ({"displacement": 0.1}, {"displacement": -0.2},
         "displacement must be at least -0.1 (guards.displacement); got -0.2"),
        ({"kl": 0.2}, {"kl": math.nan}, "kl must be at most 0.2 (guards.kl); got nan"),
    ],
)  # fmt: skip
def test_a_broken_threshold_is_told(threshold: dict[str, float], metrics: dict[str, float], told: str) -> None:
    watch = guards(**threshold)
    assert watch.check(CALM) == [] and watch.is_clean
    assert watch.check(CALM | metrics) == [told] and not watch.is_clean
    assert guards().check(CALM | metrics) == []  # without a threshold


def test_lengths_may_drift_by_a_factor_from_the_first_iteration() -> None:
    watch = guards(length_drift=2.0)
    told = []
    for tokens in (50.0, 100.0, 25.0, 101.0, 24.9):
        told += [watch.check(CALM | {"trajectory_tokens": tokens})]
    rule = "trajectory_tokens must be in [25, 100] (guards.length_drift); got"
    assert told == [[], [], [], [f"{rule} 101"], [f"{rule} 24.9"]]


def test_patience_counts_iterations_in_a_row_and_survives_resuming() -> None:
    watch = guards(kl=0.2, patience=3, length_drift=2.0)
    high = CALM | {"kl": 0.5}
    told = [watch.check(metrics) != [] for metrics in (high, high, CALM, high, high)]
    assert told == [False] * 5 and not watch.is_clean
    watch.rollbacks = 2
    other = guards(kl=0.2, patience=3, length_drift=2.0)
    other.set_state(watch.get_state())
    assert other.rollbacks == 2
    assert len(other.check(high | {"trajectory_tokens": 500.0})) == 1  # the third in a row; the length, for the first
    assert other.get_state()["first_length"] == 50.0


def test_equal_groups_are_no_matter_where_nothing_is_compared() -> None:
    watch = Guards(GuardsConfig(equal_groups=0.9), RLConfig())
    assert watch.check(CALM | {"equal_groups": 1.0}) == []


def test_metrics_that_are_not_told_are_not_held_to_anything() -> None:
    """Without KL there is none; an iteration whose every update was skipped tells nothing of updates."""
    every = guards(approx_kl=1, kl=1, clip_fraction=1, min_entropy=0.1, max_entropy=1, displacement=1, length_drift=2)
    assert every.check({"trajectory_tokens": 5.0, "no_answer_rate": 0.0}) == []


@pytest.mark.parametrize(
    ("metrics", "finite"), [((1.0, 2.0), True), ((math.nan, 2.0), False), ((1.0, math.inf), False)]
)
def test_an_update_is_one_when_its_loss_and_gradient_are_numbers(metrics: tuple[float, float], finite: bool) -> None:
    assert is_finite(dict(zip(("loss", "grad_norm"), metrics, strict=True))) is finite


def test_repeated_queries_are_counted_within_a_trajectory() -> None:
    def asking(*queries: str) -> Trajectory:
        steps = (*(Step("a", query=q) for q in queries), Step("a", answer="b"))
        return Trajectory(Question("q", "?", ("b",)), steps, Status.ANSWERED)

    assert repeated_query_rate([asking("Who  wrote it?", "who wrote it? ", "when?"), asking("when?")]) == 0.25
    assert repeated_query_rate([asking()]) == 0


def test_a_factor_is_above_1() -> None:
    with pytest.raises(ConfigError, match=r"guards.length_drift must be a factor above 1, or 0 for none; got 0.5"):
        GuardsConfig(length_drift=0.5)

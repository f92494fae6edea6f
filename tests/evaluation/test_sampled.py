"""pass@k and the majority vote."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from attempts import attempt, question

from r3rag_jax.config import ConfigError, EvalConfig
from r3rag_jax.evaluation.sampled import majority, pass_at_k, sampled_values
from r3rag_jax.evaluation.summary import summarise


@pytest.mark.parametrize("num", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(num: int) -> None:
    samples = np.asarray(list(itertools.product([0.0, 1.0], repeat=num)))
    for k in range(1, num + 1):
        counted = [
            np.mean([max(row[list(chosen)]) for chosen in itertools.combinations(range(num), k)]) for row in samples
        ]
        np.testing.assert_allclose(pass_at_k(samples, k), counted)
    with pytest.raises(ValueError, match=f"k must be from 1 to the {num} samples of a question; got {num + 1}"):
        pass_at_k(samples, num + 1)


def test_pass_at_k_is_unbiased() -> None:
    """Samples that are right with chance 0.3: the mean estimate is 1 - 0.7^4; the plug-in estimate is too small."""
    rng = np.random.default_rng(0)
    correct = (rng.random((20_000, 8)) < 0.3).astype(float)
    truth = 1 - 0.7**4
    assert pass_at_k(correct, 4).mean() == pytest.approx(truth, abs=0.006)
    assert np.mean(1 - (1 - correct.mean(axis=1)) ** 4) < truth - 0.02


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    correct = np.zeros((1, 2000))
    correct[0, :3] = 1
    assert pass_at_k(correct, 1000)[0] == pytest.approx(1 - (1000 * 999 * 998) / (2000 * 1999 * 1998))


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        (["The Paris", "paris.", "Lyon"], 0),
        (["Lyon", "Paris", "a Paris"], 1),
        (["Lyon", "Paris"], 0),  # equally frequent: the first
        ([None, "Paris", None, None], 1),  # who says nothing has no vote
        ([None, None], None),
        (["", "The"], 0),
    ],
)
def test_the_majority_is_of_normalised_answers(answers: list[str | None], chosen: int | None) -> None:
    assert majority(answers) == chosen


def test_a_sampled_evaluation() -> None:
    """Two questions of four samples: two and none are right; votes of the first are 2 to 1 for the right answer."""
    first, second = question("1", "Paris", type="bridge"), question("2", "Lyon")
    answers = [(first, ["Paris", "Rome", "the Paris", None]), (second, ["x", "y", "y", "Lyons"])]
    trajectories = [attempt(asked, answer) for asked, given in answers for answer in given]
    config = EvalConfig(samples=4, temperature=0.7)
    measured = summarise("mine", trajectories, {}, config)
    whole = measured.result["groups"]["all"]
    assert (measured.result["num_questions"], whole["num"], whole["em"]) == (2, 2, 25.0)
    assert [whole[name] for name in ("pass@1", "pass@2", "pass@4", "majority@4")] == [
        25.0, pytest.approx(100 * (1 - 1 / 6) / 2), 50.0, 50.0,
    ]  # fmt: skip
    assert measured.result["groups"]["bridge"]["em"] == 50.0
    assert whole["tokens_per_correct"] == pytest.approx(80 / 2)  # 80 tokens in all samples, two of which are right
    assert measured.result["intervals"]["majority@4"] == pytest.approx([9.45, 90.55], abs=0.01)  # Wilson's, of 1 in 2
    assert [row["id"] for row in measured.rows] == ["1", "2"] and measured.rows[0]["em"] == 0.5
    assert "pass@3" not in whole and set(sampled_values(trajectories[:3], np.ones(3), 3)) == {
        "pass@1", "pass@2", "pass@3", "majority@3",
    }  # fmt: skip


def test_intervals_of_samples_are_over_questions() -> None:
    """Ten samples of each of ten questions, all alike: a hundred trajectories say no more than ten."""
    trajectories = [
        attempt(question(str(i), "Paris"), "Paris" if i < 5 else "Rome") for i in range(10) for _ in range(10)
    ]
    low, high = summarise("m", trajectories, {}, EvalConfig(samples=10, temperature=1.0)).result["intervals"]["em"]
    assert high - low > 50
    low, high = summarise("m", trajectories, {}).result["intervals"]["em"]  # as if they were a hundred questions
    assert high - low < 20


def test_equal_fractions_are_not_certain() -> None:
    trajectories = [attempt(question(str(i), "Paris"), "Rome") for i in range(6)]
    intervals = summarise("m", trajectories, {}).result["intervals"]
    assert intervals["f1"] == intervals["em"] and intervals["em"][1] > 35
    assert intervals["output_tokens"] == [10.0, 10.0]  # nothing bounds a number of tokens


def test_several_greedy_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval\.temperature must be above 0 with eval\.samples=2"):
        EvalConfig(samples=2)
    with pytest.raises(ConfigError, match="different numbers from 1"):
        EvalConfig(recall_k=(5, 5))

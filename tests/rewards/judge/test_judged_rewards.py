"""Rewards of a judge, over a real HTTP server: both terms in one round, and what a failed judgement leaves out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judging import QUESTION, ReplyTo, open_at
from openai_server import Reply, RunningServer, chat, serve

from r3rag_jax.config import RewardConfig
from r3rag_jax.errors import UserError
from r3rag_jax.rewards import answer, scorer
from r3rag_jax.rewards.base import Resources
from r3rag_jax.rewards.scorer import Scorer, Scores, accuracy, learnable
from r3rag_jax.rewards.shaping import shape_rewards
from r3rag_jax.types import Passage, Status, Step, Trajectory

FOUND = Passage("a", "Origin is by Darwin."), Passage("b", "Origin is a book.")
OTHER = Passage("c", "Darwin sailed."), Passage("a", "Origin is by Darwin.")


def attempt(answer: str | None, *queries: str, status: Status = Status.ANSWERED) -> Trajectory:
    steps = [Step("hm", query=query, passages=(FOUND, OTHER)[i % 2]) for i, query in enumerate(queries)]
    steps += [] if answer is None else [Step("so", answer=answer)]
    return Trajectory(QUESTION, tuple(steps), status)


ATTEMPTS = [
    attempt("darwin", "author 0.5", "author 1"),  # an exact match: nobody is asked
    attempt("The naturalist Darwin", "author 0.5"),  # right, says the judge
    attempt("Wallace", "author 1"),  # wrong, says the judge
    attempt(None, "author 0.5", "author 0.3", status=Status.NO_ANSWER),
    Trajectory(QUESTION, (Step("?", is_well_formed=False),), Status.FORMAT_ERROR),
    Trajectory(QUESTION, (Step("hm", query="nothing found"), Step("so", answer="Darwin")), Status.ANSWERED),
    attempt("Wallace", "author 0.6"),
]
BY_JUDGE = RewardConfig(process="judge", outcome="judge")


def graded(*nonsense_on: str) -> ReplyTo:
    """Reads the relevance off the query and knows Darwin; talks nonsense on prompts with one of the words."""

    def reply(body: dict[str, Any]) -> Reply:
        prompt = body["messages"][0]["content"]
        if any(word in prompt for word in nonsense_on):
            return 200, chat("Hm.")
        if "Search query" in prompt:
            found = re.search(r"author ([0-9.]+)\n", prompt)
            assert found is not None  # a step that brought nothing is not asked about
            return 200, chat(f"Relevance: {found[1]}")
        return 200, chat(f"Correct: {'yes' if 'naturalist' in prompt else 'no'}")

    return reply


def rewarded(tmp_path: Path, reply: ReplyTo, config: RewardConfig = BY_JUDGE) -> tuple[Scores, RunningServer]:
    with serve(reply) as endpoint:
        judge = open_at(endpoint.url, tmp_path / "j")
        return Scorer(config, Resources(4, judge=judge)).score(ATTEMPTS), endpoint


def test_rewards_of_a_judge_typed_out(tmp_path: Path) -> None:
    scores, endpoint = rewarded(tmp_path, graded())
    expected = [[0.8, 1.6, 2.0], [0.8, 2.0], [0.8, 0.0], [0.4, -0.5], [-1.0], [0.0, 2.0], [0.48, 0.0]]
    for rewards_T, row in zip(scores.rewards, expected, strict=True):
        np.testing.assert_allclose(rewards_T, row, rtol=1e-6)
    np.testing.assert_array_equal(scores.answers["acc"], [1, 1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(scores.answers["em"], [1, 0, 0, 0, 0, 1, 0])
    assert scores.is_valid.all()
    # Queries "0.5" twice with the same passages, "Wallace" twice: the same inquiry each.
    assert len(endpoint.bodies) == scores.verdicts.num == 5 + 2
    total = sum(scores.parts.values())
    np.testing.assert_allclose(total, [r.sum() for r in scores.rewards], rtol=1e-6)
    np.testing.assert_allclose(scores.parts["outcome"], [2, 2, 0, 0, 0, 2, 0])
    np.testing.assert_allclose(scores.parts["process"], [2.4, 0.8, 0.8, 0.4, 0, 0, 0.48], rtol=1e-6)
    np.testing.assert_allclose(scores.parts["format"], [0, 0, 0, 0, -1, 0, 0])
    np.testing.assert_allclose(scores.parts["no_answer"], [0, 0, 0, -0.5, 0, 0, 0])


def test_answers_are_compared_once_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge is asked about what does not match; the reward is a match or its verdict: one comparison for both."""
    calls: list[int] = []

    def counted(trajectories: Any) -> dict[str, np.ndarray]:
        calls.append(len(trajectories))
        return compare(trajectories)

    compare = answer.answer_metrics
    for module in (answer, scorer):
        monkeypatch.setattr(module, "answer_metrics", counted)
    rewarded(tmp_path, graded())
    assert calls == [len(ATTEMPTS)]


def test_weights_and_parts_without_the_judge(tmp_path: Path) -> None:
    half = RewardConfig(process="judge", outcome="judge", process_weight=0.5, compat="paper")
    scores, _ = rewarded(tmp_path, graded(), half)
    np.testing.assert_allclose(scores.parts["process"][:4], [1.2, 0.4, 0.4, 0.45 * (0.5 + 0.3)], rtol=1e-6)
    assert not scores.parts["no_answer"].any()
    outcome_only = RewardConfig(process="judge", outcome="judge", use_process=False)
    scores, endpoint = rewarded(tmp_path / "outcome", graded(), outcome_only)
    assert len(endpoint.bodies) == 2  # no relevance is asked for that nothing depends on
    process_only = RewardConfig(process="judge", outcome="judge", use_outcome=False)
    scores, endpoint = rewarded(tmp_path / "process", graded(), process_only)
    assert len(endpoint.bodies) == 5 and "acc" not in scores.answers
    with pytest.raises(ValueError, match="needs a judge; got none"):
        Scorer(BY_JUDGE, Resources(4)).score(ATTEMPTS)


def test_a_failed_judgement_leaves_out_what_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    scores, _ = rewarded(tmp_path, graded("author 0.3", "author 0.6"))
    # The search of the last step without an answer earns the penalty, whatever it brought.
    assert scores.is_valid.tolist() == [True, True, True, True, True, True, False]
    assert np.isnan(scores.rewards[6]).tolist() == [True, False]
    kept, scores = learnable(ATTEMPTS, scores)
    assert kept == ATTEMPTS[:6] and scores.is_valid.all() and len(scores.answers["acc"]) == len(scores.process) == 6
    np.testing.assert_allclose(scores.rewards[0], [0.8, 1.6, 2.0], rtol=1e-6)

    scores, _ = rewarded(tmp_path / "outcome", graded("to judge: Wallace"))
    assert scores.is_valid.tolist() == [True, True, False, True, True, True, False]
    assert np.isnan(scores.rewards[2]).all()  # the trajectory's factor is unknown too
    assert np.isnan(scores.answers["acc"]).tolist() == [False, False, True, False, False, False, True]


def test_nothing_left_to_learn_from(tmp_path: Path) -> None:
    with serve(graded("author")) as endpoint:
        judge = open_at(endpoint.url, tmp_path / "j", max_failure_share=1.0)
        scores = Scorer(BY_JUDGE, Resources(4, judge=judge)).score(ATTEMPTS[:3])
    assert not scores.is_valid.any()
    with pytest.raises(UserError, match="failed in each of the 3 trajectories: there is nothing to learn from"):
        learnable(ATTEMPTS[:3], scores)


@pytest.mark.parametrize("compat", ["r3", "paper"])
@pytest.mark.parametrize("use_process", [True, False])
def test_unknown_is_unknown_wherever_it_counts(compat: Any, use_process: bool) -> None:
    """Both values that a failed judgement could have had: a reward is NaN exactly where they would differ.

    A relevance of 0 is left aside: it is scaled by the unknown factor to 0 all the same, and counts as unknown.
    """
    rng = np.random.default_rng(0)
    num, num_steps = 400, 4
    process = rng.integers(1, 11, (num, num_steps)).astype(np.float32) / 10
    correct = rng.integers(0, 2, num).astype(np.float32)
    status = rng.integers(0, 3, num)
    step_mask = np.arange(num_steps) < rng.integers(1, num_steps + 1, num)[:, None]
    malformed = rng.random((num, num_steps)) < 0.2
    is_failed, is_failed_answer = rng.random((num, num_steps)) < 0.3, rng.random(num) < 0.3

    def rewards(value: float) -> np.ndarray:
        shaped = shape_rewards(
            np.where(is_failed, value, process), np.where(is_failed_answer, value, correct), status, step_mask,
            malformed, compat=compat, use_process=use_process,
        )  # fmt: skip
        return np.asarray(shaped.rewards_BK)

    unknown, low, high = rewards(np.nan), rewards(0.0), rewards(1.0)
    assert 0.02 < np.isnan(unknown).mean() < 0.95
    np.testing.assert_array_equal(np.isnan(unknown), low != high)
    np.testing.assert_array_equal(unknown[low == high], low[low == high])


def test_judged_accuracy(tmp_path: Path) -> None:
    with serve(graded("Wallace")) as endpoint:
        acc, verdicts = accuracy(ATTEMPTS, open_at(endpoint.url, tmp_path / "j"))
    np.testing.assert_array_equal(acc, [1, 1, np.nan, 0, 0, 1, np.nan])
    assert verdicts.num == 2 == len(endpoint.bodies)

"""The scorer: terms and shaping together. With a judge: `judge/test_judged_rewards.py`."""

from typing import get_args, get_type_hints

import numpy as np
import pytest

from r3rag_jax.config import RewardConfig
from r3rag_jax.rewards.base import Resources, RewardTerm
from r3rag_jax.rewards.scorer import Scorer
from r3rag_jax.rewards.terms import OUTCOME_REWARDS, PROCESS_REWARDS, needed_resources
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

QUESTION = Question("q", "Who?", ("Ada",), {"supporting_ids": ["a"]})
SEARCH = Step("hm", query="who", passages=(Passage("a", "Ada"),))


@pytest.mark.parametrize(
    ("status", "reward"), [(Status.NO_ANSWER, -0.5), (Status.CONTEXT_FULL, -0.5), (Status.FORMAT_ERROR, -1.0)]
)
def test_a_step_cut_off_by_the_budget_of_all_steps_or_by_the_context_broke_no_rule(status, reward):
    steps = Step("hm", query="who"), Step("so it m", is_well_formed=False)
    [rewards] = Scorer(RewardConfig(), Resources(2)).score([Trajectory(QUESTION, steps, status, ())]).rewards
    np.testing.assert_allclose(rewards, [0, reward])


def test_scores_typed_out():
    trajectories = [
        Trajectory(QUESTION, (SEARCH, Step("so", answer="Ada")), Status.ANSWERED),
        Trajectory(QUESTION, (SEARCH, SEARCH, Step("so", answer="Ada Lovelace")), Status.ANSWERED),
        Trajectory(QUESTION, (SEARCH,), Status.NO_ANSWER),
    ]
    scores = Scorer(RewardConfig(outcome="f1"), Resources(4)).score(trajectories)
    for rewards_K, expected in zip(scores.rewards, [[1.6, 2.0], [1.6, 0, 4 / 3], [-0.5]], strict=True):
        np.testing.assert_allclose(rewards_K, expected, rtol=1e-6)
        assert rewards_K.dtype == np.float32
    np.testing.assert_array_equal(scores.process, [[1, 0, 0, 0]] * 3)
    assert scores.answers.keys() == {"em", "f1", "cover_em"} and scores.verdicts is None and scores.is_valid.all()
    np.testing.assert_allclose(scores.answers["f1"], [1, 2 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(scores.parts["outcome"], [2, 4 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(scores.parts["process"], [1.6, 1.6, 0], rtol=1e-6)
    np.testing.assert_allclose(scores.parts["no_answer"], [0, 0, -0.5])


def test_a_trajectory_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="a trajectory may have 1 steps; got 2"):
        Scorer(RewardConfig(), Resources(1)).score([Trajectory(QUESTION, (SEARCH, SEARCH), Status.NO_ANSWER)])


def test_a_process_reward_is_a_function_and_a_row(monkeypatch):
    def short_queries(trajectories, resources):
        rewards_BK = np.zeros((len(trajectories), resources.max_steps), np.float32)
        for i, trajectory in enumerate(trajectories):
            rewards_BK[i, : len(trajectory.steps)] = [step.query is not None for step in trajectory.steps]
        return rewards_BK

    monkeypatch.setitem(PROCESS_REWARDS, "gold", RewardTerm(short_queries))
    other = Step("hm", query="when", passages=(*SEARCH.passages, Passage("b", "1815")))
    trajectory = Trajectory(QUESTION, (SEARCH, SEARCH, other, SEARCH), Status.NO_ANSWER)
    [rewards] = Scorer(RewardConfig(), Resources(4)).score([trajectory]).rewards
    np.testing.assert_allclose(rewards, [0.8, 0, 0.8, -0.5], rtol=1e-6)  # whatever the term says: nothing new, nothing
    [rewards] = Scorer(RewardConfig(compat="paper"), Resources(4)).score([trajectory]).rewards
    np.testing.assert_allclose(rewards, [0.9] * 4, rtol=1e-6)


def test_a_malformed_step_of_the_paper_costs_what_it_does_in_the_released_code():
    # The configuration always passed -1, so the -0.9 of compat paper was never reached.
    bad = Trajectory(QUESTION, (Step("?", is_well_formed=False),), Status.FORMAT_ERROR)
    for used in ({}, {"use_process": False}, {"use_outcome": False}):
        [rewards] = Scorer(RewardConfig(compat="paper", **used), Resources(4)).score([bad]).rewards
        np.testing.assert_allclose(rewards, [-0.9], rtol=1e-6)


def test_process_rewards_alone_are_scaled_without_an_answer_as_in_the_released_code(monkeypatch):
    monkeypatch.setitem(PROCESS_REWARDS, "gold", RewardTerm(lambda trajectories, resources: np.full((1, 5), 0.4)))
    config = RewardConfig(compat="paper", use_outcome=False)
    [rewards] = Scorer(config, Resources(5)).score([Trajectory(QUESTION, (SEARCH,) * 5, Status.NO_ANSWER)]).rewards
    np.testing.assert_allclose(rewards, [0.36] * 5, rtol=1e-6)


def test_the_last_step_of_a_format_error_is_malformed():
    [rewards] = (
        Scorer(RewardConfig(), Resources(2)).score([Trajectory(QUESTION, (SEARCH,), Status.FORMAT_ERROR)]).rewards
    )
    np.testing.assert_allclose(rewards, [-1.0])


def test_the_configuration_names_the_rows_of_the_tables():
    assert get_args(_annotation("process")) == tuple(PROCESS_REWARDS)
    assert get_args(_annotation("outcome")) == tuple(OUTCOME_REWARDS)


def _annotation(name):
    return get_type_hints(RewardConfig)[name]


@pytest.mark.parametrize("process", PROCESS_REWARDS)
@pytest.mark.parametrize("outcome", OUTCOME_REWARDS)
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_the_configuration_knows_which_rewards_need_a_judge(process, outcome, used):
    config = RewardConfig(process=process, outcome=outcome, use_process=used[0], use_outcome=used[1])
    assert ("judge" in needed_resources(config)) == config.needs_judge
    assert ("encoder" in needed_resources(config)) == (process == "embedding")  # it is logged also where it is not used

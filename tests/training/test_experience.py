"""Resampling: questions that teach nothing are replaced by others."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
import pytest

from r3rag_jax.config import Config, RLConfig, RolloutConfig
from r3rag_jax.data.records import Records
from r3rag_jax.rewards.base import Resources
from r3rag_jax.rewards.scorer import Scorer, Scores
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.sampler.engine import SamplerWork
from r3rag_jax.training import experience
from r3rag_jax.training.experience import IterationSampler
from r3rag_jax.types import Question, Status, Step, Trajectory

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


def assert_same_scores(one: Scores, other: Scores) -> None:
    """Every bit: rounds that are scored on their own and all trajectories at once."""
    for x, y in zip(one.rewards, other.rewards, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(one.process, other.process)
    for x, y in ((one.answers, other.answers), (one.parts, other.parts)):
        assert list(x) == list(y)
        for name, value in x.items():
            np.testing.assert_array_equal(value, y[name])


def test_questions_that_teach_nothing_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake policy answers questions of an even number right or wrong in turn, and all others wrong."""
    questions = Records("rl.jsonl", enumerate((Question(str(i), f"q{i}", ("x",)) for i in range(12)), 1))
    rl_config = RLConfig(algorithm="grpo", questions=4, max_resamples=2)
    config = Config(rl=rl_config, rollout=RolloutConfig(samples=2, temperatures=(1.0,)))
    drawn: list[list[int]] = []

    def rollout(
        backend: Any, env_factory: Any, retriever: Any, requests: list[RolloutRequest], **_: Any
    ) -> list[Trajectory]:
        drawn.append([int(request.question.id) for request in requests[::2]])
        is_right = [int(request.question.id) % 2 == 0 and request.sample_index == 0 for request in requests]
        steps = [(Step("a", answer="x" if right else "y"),) for right in is_right]
        return [Trajectory(request.question, s, Status.ANSWERED) for request, s in zip(requests, steps, strict=True)]

    monkeypatch.setattr(experience, "rollout", rollout)
    scorer = Scorer(config.rewards, Resources(config.rollout.max_steps))
    idle = SamplerWork(0, 0, 0, 0, 0.0)
    sampler = IterationSampler(config, questions, None, None, scorer, work=lambda: idle)  # type: ignore[arg-type]
    for iteration in range(3):
        drawn.clear()
        rollouts = sampler.run(iteration, backend=None)
        found = rollouts.score(scorer, totals=False)
        assert_same_scores(found.scores, scorer.score(found.trajectories))
        is_even = [int(t.question.id) % 2 == 0 for t in found.trajectories]
        assert found.zero_variance.tolist() == [not even for even in is_even]
        numbers = [number for draw in drawn for number in draw]
        assert len(set(numbers)) == len(numbers) and 1 < len(drawn) <= 3
        for draw, before in zip(drawn[1:], itertools.accumulate(drawn), strict=False):
            assert len(draw) == min(4 - sum(n % 2 == 0 for n in before), 12 - len(before))  # as many as are missing
        assert [int(t.question.id) for t in found.trajectories[::2]] == numbers
        again = [*drawn]
        drawn.clear()
        sampler.run(iteration, backend=None)
        assert drawn == again

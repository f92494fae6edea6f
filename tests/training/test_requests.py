"""Which questions an iteration rolls out."""

from __future__ import annotations

import jax
import pytest

from r3rag_jax.config import Config, RLConfig, RolloutConfig
from r3rag_jax.training.requests import iteration_requests
from r3rag_jax.types import Question

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


def test_every_question_comes_once_before_any_comes_again() -> None:
    questions = [Question(str(i), f"q{i}", ("x",)) for i in range(10)]
    config = Config(rl=RLConfig(questions=4), rollout=RolloutConfig(samples=3, temperatures=(0.4, 1.0)))
    requests = [iteration_requests(config, questions, iteration) for iteration in range(5)]
    ids = [request.question.id for iteration in requests for request in iteration[::3]]
    assert sorted(ids[:10]) == sorted(ids[10:]) == sorted(str(i) for i in range(10))
    assert ids[:10] != ids[10:] and ids[:10] != sorted(ids[:10])
    assert [(request.sample_index, request.temperature) for request in requests[0][:3]] == [
        (0, 0.4),
        (1, 1.0),
        (2, 0.4),
    ]
    assert requests[2] == iteration_requests(config, questions, 2)
    assert len({request.seed for iteration in requests for request in iteration}) == 5
    assert {request.seed for request in requests[0]}.isdisjoint({request.seed for request in iteration_requests(
        Config(seed=1, rl=config.rl, rollout=config.rollout), questions, 0)})  # fmt: skip

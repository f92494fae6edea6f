"""Which questions an RL iteration samples, with which seeds and temperatures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r3rag_jax.config import Config
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.types import Question


def iteration_requests(config: Config, questions: Sequence[Question], iteration: int) -> list[RolloutRequest]:
    """The requests of an iteration, a function of seed and iteration alone: resuming needs no data position.

    Each pass through all questions has a random order of its own.
    """
    requests = []
    for number in range(iteration * config.rl.questions, (iteration + 1) * config.rl.questions):
        epoch, index = divmod(number, len(questions))
        order = np.random.default_rng((config.seed, epoch)).permutation(len(questions))
        requests += sample_requests(config, questions[order[index]], iteration)
    return requests


def replacement_requests(
    config: Config, questions: Sequence[Question], iteration: int, round_: int, count: int, taken: set[str]
) -> list[RolloutRequest]:
    """Requests of `count` more questions for an iteration, drawn at random from those whose ids are not `taken`."""
    free = [question for question in questions if question.id not in taken]
    order = np.random.default_rng((config.seed, iteration, round_)).permutation(len(free))[: max(0, count)]
    return [request for index in order for request in sample_requests(config, free[index], iteration)]


def sample_requests(config: Config, question: Question, iteration: int) -> list[RolloutRequest]:
    """The `rollout.samples` requests of one question."""
    temperatures, seed = config.rollout.temperatures, config.seed * 1_000_003 + iteration
    return [
        RolloutRequest(question, i, temperatures[i % len(temperatures)], seed=seed)
        for i in range(config.rollout.samples)
    ]

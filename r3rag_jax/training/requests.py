"""Which questions an iteration of RL plays, and with which seeds and temperatures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r3rag_jax.config import Config
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.types import Question


def iteration_jobs(config: Config, questions: Sequence[Question], iteration: int) -> list[RolloutRequest]:
    """The jobs of an iteration, a function of seed and iteration alone: resuming needs no data position.

    Questions come in a new random order each time through all of them.
    """
    jobs = []
    for place in range(iteration * config.rl.questions, (iteration + 1) * config.rl.questions):
        epoch, at = divmod(place, len(questions))
        order = np.random.default_rng((config.seed, epoch)).permutation(len(questions))
        jobs += samples_of(config, questions[order[at]], iteration)
    return jobs


def more_jobs(
    config: Config, questions: Sequence[Question], iteration: int, draw: int, count: int, taken: set[str]
) -> list[RolloutRequest]:
    """Jobs of `count` questions more for an iteration, drawn by chance from those that are not `taken`."""
    free = [question for question in questions if question.id not in taken]
    order = np.random.default_rng((config.seed, iteration, draw)).permutation(len(free))[: max(0, count)]
    return [job for at in order for job in samples_of(config, free[at], iteration)]


def samples_of(config: Config, question: Question, iteration: int) -> list[RolloutRequest]:
    temperatures, seed = config.rollout.temperatures, config.seed * 1_000_003 + iteration
    return [
        RolloutRequest(question, i, temperatures[i % len(temperatures)], seed=seed)
        for i in range(config.rollout.samples)
    ]

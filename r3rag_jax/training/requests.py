"""Which questions an iteration of RL rolls out, with which seeds and temperatures."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from r3rag_jax.config import Config
from r3rag_jax.data.records import Records
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.types import Question


def iteration_requests(config: Config, questions: Sequence[Question], iteration: int) -> list[RolloutRequest]:
    """The requests of an iteration: a function of seed and iteration alone, so that resuming needs no data position.

    Every question is used once before any is used again, in an order that is shuffled anew for each pass. A question
    that is drawn again in the same iteration (the end of one pass and the beginning of the next, or fewer questions
    than `rl.questions`) gets further sample indices, hence other random keys: its samples are one larger group.
    """
    requests = []
    num_draws: Counter[str] = Counter()  # in this iteration, by question id
    for index in range(iteration * config.rl.questions, (iteration + 1) * config.rl.questions):
        epoch, index_in_epoch = divmod(index, len(questions))
        order = np.random.default_rng((config.seed, epoch)).permutation(len(questions))
        question = questions[order[index_in_epoch]]
        requests += _requests_of(config, question, iteration, num_draws[question.id])
        num_draws[question.id] += 1
    return requests


def replacement_requests(
    config: Config,
    questions: Sequence[Question],
    iteration: int,
    round: int,
    num_questions: int,
    used_ids: Collection[str],
) -> list[RolloutRequest]:
    """Requests of up to `num_questions` further questions for an iteration, drawn from those not in `used_ids`.

    Args:
        round: 1 for the first replacements of the iteration, then counted up; part of the random seed.
    """
    ids = questions.ids if isinstance(questions, Records) else [question.id for question in questions]
    unused = [index for index, id in enumerate(ids) if id not in used_ids]
    order = np.random.default_rng((config.seed, iteration, round)).permutation(len(unused))[: max(0, num_questions)]
    return [request for index in order for request in _requests_of(config, questions[unused[index]], iteration)]


def _requests_of(config: Config, question: Question, iteration: int, draw: int = 0) -> list[RolloutRequest]:
    """`rollout.samples` requests of a question, cycling through `rollout.temperatures`.

    Args:
        draw: how often the iteration has drawn the question before.
    """
    rollout, seed = config.rollout, config.seed * 1_000_003 + iteration
    return [
        RolloutRequest(question, draw * rollout.samples + index, temperature, seed=seed)
        for index, temperature in zip(range(rollout.samples), itertools.cycle(rollout.temperatures), strict=False)
    ]

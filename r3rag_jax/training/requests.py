"""Which questions an iteration of RL rolls out, with which seeds and temperatures."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence

from r3rag_jax.config import Config
from r3rag_jax.data.balance import shuffled, strata_of
from r3rag_jax.data.records import Records
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.types import Question


class QuestionDraws:
    """The questions that each iteration rolls out: a function of seed and iteration alone.

    Resuming therefore needs no data position. Every question is used once before any is used again, in an order that is
    shuffled anew for each pass; with `rl.balance` an iteration has as many of one kind as of another, while a pass
    has any. A question that is drawn again in the same iteration (the end of one pass and the beginning of the next, or
    fewer questions than `rl.questions`) gets further sample indices, hence other random keys: its samples are one
    larger group.
    """

    def __init__(self, config: Config, questions: Records[Question]):
        """
        Raises:
            UserError: a question's metadata lacks a field of `rl.balance`.
        """
        self._config, self._questions = config, questions
        self._strata = strata_of(questions, config.rl.balance, "rl.balance")

    def requests(self, iteration: int) -> list[RolloutRequest]:
        """The requests of an iteration."""
        num, seed = self._config.rl.questions, self._config.seed
        found, orders = [], dict[int, list[int]]()
        num_draws: Counter[int] = Counter()  # in this iteration, by question
        for place in range(iteration * num, (iteration + 1) * num):
            epoch, place_in_epoch = divmod(place, len(self._questions))
            if epoch not in orders:
                orders[epoch] = self._shuffled(range(len(self._questions)), (seed, epoch))
            index = orders[epoch][place_in_epoch]
            found += self._requests_of(index, iteration, num_draws[index])
            num_draws[index] += 1
        return found

    def replacements(
        self, iteration: int, round: int, num_questions: int, used_ids: Collection[str]
    ) -> list[RolloutRequest]:
        """Requests of up to `num_questions` further questions for an iteration, drawn from those not in `used_ids`.

        Args:
            round: 1 for the first replacements of the iteration, then counted up; part of the random seed.
        """
        unused = [index for index, id in enumerate(self._questions.ids) if id not in used_ids]
        order = self._shuffled(unused, (self._config.seed, iteration, round))[: max(0, num_questions)]
        return [request for index in order for request in self._requests_of(index, iteration)]

    def _shuffled(self, indices: Sequence[int], seed: tuple[int, ...]) -> list[int]:
        """These questions in a random order, balanced."""
        return [indices[place] for place in shuffled([self._strata[index] for index in indices], seed)]

    def _requests_of(self, index: int, iteration: int, draw: int = 0) -> list[RolloutRequest]:
        """`rollout.samples` requests of a question, cycling through `rollout.temperatures`.

        Args:
            draw: how often the iteration has drawn the question before.
        """
        rollout, question = self._config.rollout, self._questions[index]
        seed = self._config.seed * 1_000_003 + iteration
        return [
            RolloutRequest(question, draw * rollout.samples + sample, temperature, seed=seed)
            for sample, temperature in zip(range(rollout.samples), itertools.cycle(rollout.temperatures), strict=False)
        ]

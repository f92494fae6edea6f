"""Where attempts come from: a teacher at several temperatures, or gold decompositions in several wordings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from r3rag_jax.coldstart.journal import Attempt, Facts
from r3rag_jax.coldstart.teacher_env import TeacherEnv, TeacherRules
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.rollout.backends import RolloutBackend
from r3rag_jax.rollout.env import EnvFactory, StopRule
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.types import Question, Trajectory

OnAttempt = Callable[[Attempt | None, Question], None]  # None: a request has failed, and the attempt is not finished


class Source(Protocol):
    """Makes attempts at questions."""

    @property
    def facts(self) -> Facts:
        """What an attempt depends on besides the question, as JSON values."""
        ...

    @property
    def num_attempts(self) -> int:
        """Most attempts at a question."""
        ...

    def play(self, questions: Sequence[Question], number: int, on_attempt: OnAttempt) -> None:
        """Make attempt `number` (from 0) at each question.

        Raises:
            RetrievalError: a search failed.
            UserError: the teacher fails too often.
        """
        ...

    def fault_of(self, trajectory: Trajectory) -> str | None:
        """What the source itself holds against a trajectory."""
        ...


class TeacherSource:
    """Attempts of a teacher, each at a temperature of its own."""

    def __init__(
        self,
        backend: RolloutBackend,
        stops: StopRule,
        rules: TeacherRules,
        retriever: Retriever,
        *,
        temperatures: Sequence[float],
        seed: int,
        search_overlap: int,
        facts: Facts,
    ):
        """
        Args:
            temperatures: of each attempt at a question.
            seed: of sampling.
            search_overlap: see `rollout`.
            facts: see `Source.facts`.
        """
        self._backend, self._stops, self._rules, self._retriever = backend, stops, rules, retriever
        self._temperatures, self._seed, self._search_overlap = temperatures, seed, search_overlap
        self.facts = facts

    @property
    def num_attempts(self) -> int:
        """See `Source.num_attempts`."""
        return len(self._temperatures)

    def play(self, questions: Sequence[Question], number: int, on_attempt: OnAttempt) -> None:
        """See `Source.play`."""
        temperature = self._temperatures[number]
        envs: dict[str, TeacherEnv] = {}  # of attempts under way, by question

        def make(request: RolloutRequest) -> TeacherEnv:
            env = envs[request.question.id] = TeacherEnv(request, self._rules)
            return env

        def on_done(trajectory: Trajectory) -> None:
            question = trajectory.question
            has_failed = envs.pop(question.id).has_failed
            on_attempt(None if has_failed else Attempt.of(trajectory, temperature), question)

        rollout(
            self._backend,
            EnvFactory(make, self._stops),
            self._retriever,
            [RolloutRequest(question, number, temperature, self._seed) for question in questions],
            search_overlap=self._search_overlap,
            on_done=on_done,
        )

    def fault_of(self, trajectory: Trajectory) -> str | None:
        """See `Source.fault_of`: a teacher's trajectories are judged by their answers."""
        return None

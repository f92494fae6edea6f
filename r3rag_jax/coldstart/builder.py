"""The loop of the cold start builder: attempts at questions, until each has an accepted trajectory or no attempt left.

    block of questions ─► attempt 0 ─► rejection ─► attempt 1, of those without a trajectory ─► … ─► next block

What is accepted is a function of the journal alone: a build that goes on judges the attempts of the journal again, and
makes those that are missing.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from r3rag_jax.coldstart.journal import Attempt, Journal
from r3rag_jax.coldstart.rejection import DUPLICATE, SURPLUS, Gate, signature
from r3rag_jax.coldstart.sources import Source
from r3rag_jax.data.questions import identity
from r3rag_jax.types import Question, Trajectory

BLOCK = 256  # questions at least; as many as keep the slots busy while the last attempts of a round are waited for
JUDGED_TOGETHER = 256  # attempts of a journal


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a build ends, besides with the last question; 0 = never.

    Fields:
        keep: most accepted trajectories of a question, at least 1.
        num_trajectories: of all questions.
    """

    keep: int = 1
    num_trajectories: int = 0
    max_cost: float = 0.0


@dataclasses.dataclass
class Tally:
    """What has become of the attempts."""

    accepted: int = 0
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)  # by reason
    at_temperature: dict[float, list[int]] = dataclasses.field(default_factory=dict)  # [attempts, accepted]
    num_failed: int = 0  # unfinished, because a request has failed; not among the attempts
    num_new: int = 0  # attempts of this process
    num_repeated: int = 0  # questions with the text of an earlier one
    ended_by: str = ""  # the limit that has ended the build

    @property
    def attempts(self) -> int:
        """All judged attempts."""
        return self.accepted + self.rejected.total()

    def add(self, attempt: Attempt, reason: str | None) -> None:
        """Count an attempt, which is rejected for a reason, or accepted."""
        counts = self.at_temperature.setdefault(attempt.temperature, [0, 0])
        counts[0] += 1
        counts[1] += reason is None
        if reason is None:
            self.accepted += 1
        else:
            self.rejected[reason] += 1


class _Enough(Exception):
    """A limit is reached."""


class Builder:
    """The state of one build."""

    def __init__(
        self,
        source: Source,
        gate: Gate,
        journal: Journal,
        limits: Limits,
        *,
        slots: int,
        cost: Callable[[], float] = lambda: 0.0,
        advance: Callable[..., None] = lambda count, **numbers: None,
    ):
        """
        Args:
            slots: attempts that are under way at the same time.
            cost: of the teacher so far.
            advance: shows progress, see `ProgressBar.advance`; counted are questions that need no further attempt.
        """
        self._source, self._gate, self._journal, self._limits = source, gate, journal, limits
        self._block, self._cost, self._advance = max(BLOCK, 8 * slots), cost, advance
        self.tally = Tally()
        self.has_judged_journal = False
        self._kept: dict[str, list[Trajectory]] = {}  # question id -> accepted trajectories
        self._made: dict[str, set[int]] = {}  # question id -> numbers of its finished attempts
        self._waiting: list[Attempt] = []  # for the judge
        self._settled: set[str] = set()  # ids of the questions that were counted as done
        self._began = (0, time.monotonic())  # how many these were when the first attempt was made, and when that was

    def run(self, questions: Sequence[Question]) -> list[Trajectory]:
        """Return the accepted trajectories, in the order of the questions.

        Raises:
            RetrievalError, UserError: see `Source.play`. All finished attempts are in the journal.
        """
        asked = self._distinct(questions)
        self._take_up(asked)
        self.has_judged_journal = True
        self._num_asked = len(asked)
        self._show(asked)
        self._began = (len(self._settled), time.monotonic())
        try:
            for start in range(0, len(asked), self._block):
                self._check_limits()
                self._build(asked[start : start + self._block])
        except _Enough:
            self._settle()
        return self.accepted(asked)

    def accepted(self, questions: Iterable[Question]) -> list[Trajectory]:
        """The accepted trajectories of questions, of each in the order of its attempts."""
        found = (self._kept.get(question.id, []) for question in questions)
        return [trajectory for kept in found for trajectory in sorted(kept, key=lambda t: t.sample_index)]

    def _distinct(self, questions: Sequence[Question]) -> list[Question]:
        """The questions without those whose text is there before."""
        first: dict[str, Question] = {}
        for question in questions:
            first.setdefault(identity(question), question)
        self.tally.num_repeated = len(questions) - len(first)
        return [*first.values()]

    def _take_up(self, asked: Sequence[Question]) -> None:
        """Judge the attempts of the journal; those at other questions do not count."""
        by_id = {question.id: question for question in asked}
        for attempt in self._journal.attempts():
            question = by_id.get(attempt.trajectory.question.id)
            if question is not None and identity(question) == identity(attempt.trajectory.question):
                # Answers and metadata are those of the file as it is now.
                self._take(Attempt(dataclasses.replace(attempt.trajectory, question=question), attempt.temperature))
                if len(self._waiting) >= JUDGED_TOGETHER:
                    self._settle()
        self._settle()

    def _build(self, questions: Sequence[Question]) -> None:
        for number in range(self._source.num_attempts):
            wanted = [q for q in questions if not self._has_enough(q) and number not in self._made.get(q.id, ())]
            if wanted:
                self._source.play(wanted, number, self._on_attempt)
                self._settle()
                self._show(wanted)

    def _on_attempt(self, attempt: Attempt | None, question: Question) -> None:
        if attempt is None:
            self.tally.num_failed += 1
        else:
            self._journal.add_attempt(attempt)
            self.tally.num_new += 1
            self._take(attempt)
            if not self._gate.asks_a_judge:
                self._settle()
        self._show([question])
        self._check_limits()

    def _take(self, attempt: Attempt) -> None:
        self._made.setdefault(attempt.trajectory.question.id, set()).add(attempt.trajectory.sample_index)
        self._waiting.append(attempt)

    def _settle(self) -> None:
        """Judge the attempts that wait for it."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        reasons = self._gate.reasons([attempt.trajectory for attempt in waiting])
        for attempt, reason in zip(waiting, reasons, strict=True):
            trajectory = attempt.trajectory
            kept = self._kept.setdefault(trajectory.question.id, [])
            if reason is None and signature(trajectory) in map(signature, kept):
                reason = DUPLICATE
            elif reason is None and len(kept) >= self._limits.keep:
                reason = SURPLUS
            if reason is None:
                kept.append(trajectory)
            self.tally.add(attempt, reason)

    def _has_enough(self, question: Question) -> bool:
        return len(self._kept.get(question.id, ())) >= self._limits.keep

    def _is_settled(self, question: Question) -> bool:
        """Whether no further attempt at the question will be made."""
        made = self._made.get(question.id, set())
        return self._has_enough(question) or made.issuperset(range(self._source.num_attempts))

    def _check_limits(self) -> None:
        limits = self._limits
        if 0 < limits.num_trajectories <= self.tally.accepted:
            self.tally.ended_by = "coldstart.num_trajectories"
        elif 0 < limits.max_cost <= self._cost():
            self.tally.ended_by = "coldstart.max_cost"
        if self.tally.ended_by:
            raise _Enough

    def _show(self, questions: Iterable[Question]) -> None:
        """Show progress, after attempts at these questions."""
        new = {q.id for q in questions if q.id not in self._settled and self._is_settled(q)}
        self._settled |= new
        tally, numbers = self.tally, dict[str, float]()
        numbers["accepted"] = tally.accepted
        numbers["percent_of_attempts"] = 100 * tally.accepted / max(1, tally.attempts)
        if cost := self._cost():
            numbers["cost"] = cost
        if (num := len(self._settled) - self._began[0]) > 0:
            seconds = (time.monotonic() - self._began[1]) / num  # for a question
            numbers["left_s"] = seconds * (self._num_asked - len(self._settled))
        self._advance(len(new), **numbers)

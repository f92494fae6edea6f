"""Which attempts become trajectories: the answer is right, every step is well formed, and the policy can play it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from r3rag_jax.rewards.answer import answer_metrics
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.rewards.novelty import normalize_query
from r3rag_jax.rewards.scorer import accuracy
from r3rag_jax.types import Status, Trajectory

FaultOf = Callable[[Trajectory], str | None]  # why a trajectory cannot be used; None: it can

OF_STATUS = {
    Status.FORMAT_ERROR: "a step is malformed",
    Status.NO_ANSWER: "no answer in rollout.max_steps steps",
    Status.CONTEXT_FULL: "the context is full before an answer",
}
TOO_FEW_SEARCHES = "too few searches"
WRONG, NOT_JUDGED = "the answer is wrong", "the judge has failed"
NOT_PLAYABLE = "the policy cannot play it"
DUPLICATE, SURPLUS = "equal to an accepted one", "more than coldstart.keep of the question"


class Gate:
    """Says why an attempt is rejected. That depends on the attempt alone: a journal may be judged again."""

    def __init__(
        self,
        *,
        min_searches: int,
        evidence_fault: FaultOf,
        policy_fault: FaultOf,
        judge: Judge | None,
    ):
        """
        Args:
            min_searches: fewer are too few.
            evidence_fault: what the source of the trajectories holds against one; its text is the reason.
            policy_fault: why the policy's Env does not play one; see `replay.fault_of`.
            judge: decides on answers that are no exact match; None: these are wrong.
        """
        self._min_searches, self._judge = min_searches, judge
        self._evidence_fault, self._policy_fault = evidence_fault, policy_fault
        self.first_fault = ""  # of an attempt that the policy cannot play, for a message

    @property
    def asks_a_judge(self) -> bool:
        """Whether many attempts are better judged together."""
        return self._judge is not None

    def reasons(self, trajectories: Sequence[Trajectory]) -> list[str | None]:
        """Why each trajectory is rejected; None = it is accepted.

        Raises:
            UserError: the judge fails too often.
        """
        found = [self._form(trajectory) for trajectory in trajectories]
        left = [i for i, reason in enumerate(found) if reason is None]
        correct_B = self._correct([trajectories[i] for i in left]) if left else ()
        for i, correct in zip(left, correct_B, strict=True):
            found[i] = NOT_JUDGED if np.isnan(correct) else None if correct == 1 else WRONG
            if found[i] is None:
                found[i] = self._evidence_fault(trajectories[i]) or self._play(trajectories[i])
        return found

    def _form(self, trajectory: Trajectory) -> str | None:
        if trajectory.status is not Status.ANSWERED:
            return OF_STATUS[trajectory.status]
        return TOO_FEW_SEARCHES if trajectory.num_retrievals < self._min_searches else None

    def _correct(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        if self._judge is None:
            return answer_metrics(trajectories)["em"]
        return accuracy(trajectories, self._judge)[0]

    def _play(self, trajectory: Trajectory) -> str | None:
        fault = self._policy_fault(trajectory)
        self.first_fault = self.first_fault or fault or ""
        return None if fault is None else NOT_PLAYABLE


def signature(trajectory: Trajectory) -> tuple[str, ...]:
    """What equal trajectories of a question have in common: their queries and their answer, as words."""
    return tuple(normalize_query(step.query or step.answer or "") for step in trajectory.steps)

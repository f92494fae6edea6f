"""The trajectories that the report shows; all are chosen by a fixed rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from r3rag_jax.config.evaluation import TRAINED_SYSTEMS
from r3rag_jax.evaluation.groups import type_group
from r3rag_jax.reporting.rendering import is_correct
from r3rag_jax.reporting.run_files import Run
from r3rag_jax.types import Trajectory

ALL_QUESTIONS = "all questions"  # heading of questions without a type
COMPARED = TRAINED_SYSTEMS[::-1]  # the gallery's main system, and the one with which it is compared


class Exhibit(NamedTuple):
    """A trajectory of the main system and, if there is one, the other system's on the same question."""

    title: str  # one of CASES
    main: Trajectory
    other: Trajectory | None
    num: int  # number of questions with this case


def gallery(run: Run) -> tuple[str, str, dict[str, list[Exhibit]]]:
    """Return (main system, other system or "", exhibits by question type).

    The exhibits of a type are the first trajectory, in file order, of each case: right and wrong or, with a second
    system, their four combinations. If the run has no trajectories of R3-RAG, another system is the main one.
    """
    available = [system for system in (*COMPARED, *run.trajectories) if run.trajectories.get(system)]
    if not available:
        return "", "", {}
    main, other = available[0], COMPARED[1]
    others = {} if main == other else {t.question.id: t for t in run.trajectories.get(other, ())}
    cases: dict[str, dict[str, list[Trajectory]]] = {}
    for trajectory in run.trajectories[main]:
        of_type = cases.setdefault(type_group(trajectory.question) or ALL_QUESTIONS, {})
        of_type.setdefault(_case(trajectory, others.get(trajectory.question.id)), []).append(trajectory)
    exhibits = {
        kind: [_exhibit(case, found[case], others) for case in CASES if case in found] for kind, found in cases.items()
    }
    return main, other if others else "", exhibits


def _exhibit(case: str, found: Sequence[Trajectory], others: dict[str, Trajectory]) -> Exhibit:
    return Exhibit(case, found[0], others.get(found[0].question.id), len(found))


CASES = ("newly right", "right both times", "newly wrong", "wrong both times", "right", "wrong")


def _case(main: Trajectory, other: Trajectory | None) -> str:
    if other is None:
        return "right" if is_correct(main) else "wrong"
    if is_correct(main):
        return "right both times" if is_correct(other) else "newly right"
    return "newly wrong" if is_correct(other) else "wrong both times"


def milestones(run: Run) -> list[tuple[int, float, Trajectory]]:
    """The first logged rollout of the first, middle and last RL iteration: (iteration, reward, trajectory)."""
    iterations = sorted({iteration for iteration, _, _ in run.rollouts})
    chosen = {iterations[i] for i in (0, len(iterations) // 2, -1)} if iterations else set()
    first = {iteration: (iteration, reward, t) for iteration, reward, t in reversed(run.rollouts)}
    return [first[iteration] for iteration in sorted(chosen)]

"""Trajectories that the report shows: chosen by rule, none by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from r3rag_jax.reporting.rendering import is_correct
from r3rag_jax.reporting.run_files import Run
from r3rag_jax.types import Trajectory

COMPARED = ("r3rag", "cold_start")  # the gallery's system and the one beside it


class Exhibit(NamedTuple):
    """A trajectory of the gallery and, if there is one, the other system's on the same question."""

    title: str  # which case it stands for
    main: Trajectory
    other: Trajectory | None
    num: int  # questions of this case


def gallery(run: Run) -> tuple[str, str, dict[str, list[Exhibit]]]:
    """The gallery's systems and, per question type, the first trajectory of each case.

    Cases are right and wrong, with a second system their four combinations. The first of a case in
    file order is shown: nothing is picked by hand. Without R3-RAG another system stands in.
    """
    have = [system for system in (*COMPARED, *run.trajectories) if run.trajectories.get(system)]
    if not have:
        return "", "", {}
    main, other = have[0], COMPARED[1]
    beside = {} if main == other else {t.question.id: t for t in run.trajectories.get(other, ())}
    cases: dict[str, dict[str, list[Trajectory]]] = {}
    for trajectory in run.trajectories[main]:
        of_type = cases.setdefault(str(trajectory.question.metadata.get("type", "all questions")), {})
        of_type.setdefault(_case(trajectory, beside.get(trajectory.question.id)), []).append(trajectory)
    exhibits = {
        kind: [_exhibit(case, found[case], beside) for case in CASES if case in found] for kind, found in cases.items()
    }
    return main, other if beside else "", exhibits


def _exhibit(case: str, found: Sequence[Trajectory], beside: dict[str, Trajectory]) -> Exhibit:
    return Exhibit(case, found[0], beside.get(found[0].question.id), len(found))


CASES = ("newly right", "right both times", "newly wrong", "wrong both times", "right", "wrong")


def _case(main: Trajectory, other: Trajectory | None) -> str:
    if other is None:
        return "right" if is_correct(main) else "wrong"
    if is_correct(main):
        return "right both times" if is_correct(other) else "newly right"
    return "newly wrong" if is_correct(other) else "wrong both times"


def milestones(run: Run) -> list[tuple[int, float, Trajectory]]:
    """The first rollout kept of the first, the middle and the last RL iteration."""
    iterations = sorted({iteration for iteration, _, _ in run.rollouts})
    chosen = {iterations[i] for i in (0, len(iterations) // 2, -1)} if iterations else set()
    first = {iteration: (iteration, reward, t) for iteration, reward, t in reversed(run.rollouts)}
    return [first[iteration] for iteration in sorted(chosen)]

"""Trajectories as JSONL: recorded ones, and those of a teacher, from which the cold start learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from r3rag_jax.data.fields import FieldError, Row, get_field, get_ids, get_text, kind_of
from r3rag_jax.data.jsonl import read_all, read_parsed, read_rows
from r3rag_jax.data.questions import passage_from_dict, passage_to_dict, question_to_dict
from r3rag_jax.data.readers.flashrag import question_from_dict
from r3rag_jax.data.records import STOP, OnError, Records
from r3rag_jax.errors import UserError
from r3rag_jax.types import Passage, Status, Step, Trajectory


def read_trajectories(
    path: str | Path, corpus: Mapping[str, Passage], passages_per_step: int, on_error: OnError = STOP
) -> Records[Trajectory]:
    """Read a teacher's trajectories, without samples, with the passages that a rollout would show.

    A record is `{id, question, golden_answers, metadata?, steps}`; a step is `{analysis, query, …}`, and the last one
    `{analysis, answer}`. A step with a query names its passages, best first, by `retrieved_ids`, or holds them as
    `passages: [{id, contents}, …]`; `passage_ids` are those that the step needs, which are always shown.
    `sample_index` (0 where missing) distinguishes trajectories of one question. As in a rollout, a step does not show
    passages of earlier steps again, but the next best ones.

    Args:
        path: a file in one of the forms of `forms.py`.
        corpus: passage id -> passage, e.g. a `PassageStore`; may be empty when the steps hold their passages.
        passages_per_step: most passages of a step; only `passage_ids` may exceed it.

    Raises:
        UserError: unless `on_error` leaves it out, a row breaks a rule, or names an id that the corpus does not hold;
            names file and line.
    """
    if passages_per_step < 1:
        raise UserError(f"passages_per_step must be at least 1; got {passages_per_step}")
    return read_all(
        path,
        lambda row, _: teacher_trajectory_from_dict(row, corpus, passages_per_step),
        lambda trajectory: (trajectory.question.id, trajectory.sample_index),
        on_error,
    )


def teacher_rows(path: str | Path, lines: Iterable[int]) -> Records[dict[str, Any]]:
    """The records of a teacher's trajectories at these lines, in one shape, as `teacher_trajectory_from_dict` reads it.

    Args:
        lines: of the records that `read_trajectories` has kept.
    """
    kept = set(lines)

    def shaped(row: Row) -> dict[str, Any]:
        sample_index = get_field(row, "sample_index", int, default=0)
        return question_to_dict(question_from_dict(row)) | {"sample_index": sample_index, "steps": row["steps"]}

    rows = read_rows(path, OnError("skip", say=lambda _: None))  # faults were reported when they were read first
    return Records(path, ((line, shaped(row)) for line, row in rows if line in kept))


def read_recorded(path: str | Path) -> list[Trajectory]:
    """Read trajectories that an evaluation or RL has written, with their passages and without samples.

    Raises:
        UserError: a row is none; names file and line.
    """
    return [trajectory for _, trajectory in read_parsed(path, trajectory_from_dict)]


def trajectory_from_dict(row: Row) -> Trajectory:
    """Inverse of `trajectory_to_dict`; a FieldError names the field at fault."""
    name = get_field(row, "status", str)
    if name not in Status.__members__:
        raise FieldError(f"status must be one of {', '.join(Status.__members__)}; got {name!r}")
    return Trajectory(
        question=question_from_dict(row),
        steps=tuple(_each_step(row, _recorded_step)),
        status=Status[name],
        sample_index=get_field(row, "sample_index", int),
    )


def _recorded_step(row: Row) -> Step:
    is_well_formed = get_field(row, "is_well_formed", bool, default=True)
    query, answer = (get_field(row, name, str, default=None) for name in ("query", "answer"))
    if is_well_formed and (query is None) == (answer is None):
        raise FieldError("a well-formed step must hold either a query or an answer")
    return Step(
        analysis=get_field(row, "analysis", str),
        query=query,
        answer=answer,
        passages=_passages(get_field(row, "passages", list, default=None) or []),
        is_well_formed=is_well_formed,
    )


def teacher_trajectory_from_dict(row: Row, corpus: Mapping[str, Passage], passages_per_step: int) -> Trajectory:
    """Parse one line as `read_trajectories` does; a FieldError names step and field at fault."""
    shown: set[str] = set()  # ids of the passages of earlier steps

    def read_step(step: Row) -> Step:
        analysis = get_text(step, "analysis")
        if (step.get("query") is None) == (step.get("answer") is None):
            raise FieldError("a step must hold either a query or an answer")
        if step.get("answer") is not None:
            return Step(analysis=analysis, answer=get_text(step, "answer"))
        passages = _choose(*_ranked_passages(step, corpus), shown, passages_per_step)
        shown.update(passage.id for passage in passages)
        return Step(analysis=analysis, query=get_text(step, "query"), passages=passages)

    steps = tuple(_each_step(row, read_step))
    if not steps or [step.answer is not None for step in steps] != [False] * (len(steps) - 1) + [True]:
        raise FieldError("steps must end with the only one that holds an answer")
    return Trajectory(
        question=question_from_dict(row),
        steps=steps,
        status=Status.ANSWERED,
        sample_index=get_field(row, "sample_index", int, default=0),
    )


def _ranked_passages(step: Row, corpus: Mapping[str, Passage]) -> tuple[list[Passage], set[str]]:
    """The passages of a step with a query, best first, and the ids of those that it needs."""
    if all(step.get(name) is None for name in ("passages", "retrieved_ids", "passage_ids")):
        raise FieldError("a query step must hold passages, retrieved_ids or passage_ids; got none of them")
    inline = {passage.id: passage for passage in _passages(get_field(step, "passages", list, default=None) or [])}
    needed = get_ids(step, "passage_ids")
    order = dict.fromkeys([*inline, *get_ids(step, "retrieved_ids"), *needed])  # keeps the first of equals
    found = []
    for passage_id in order:
        try:
            found.append(inline.get(passage_id) or corpus[passage_id])
        except KeyError:
            raise FieldError(
                f"passage ids must be in the corpus of {len(corpus)} passages; got {passage_id!r}"
            ) from None
    return found, set(needed)


def _choose(ranked: Sequence[Passage], needed: set[str], shown: set[str], limit: int) -> tuple[Passage, ...]:
    """The best `limit` passages not yet shown, in rank order; every needed one takes the slot of a lower one.

    With limit 2:  ranked a b c d, needed {c}, shown {}   ->  a c
                   ranked a b c d, needed {c}, shown {a}  ->  b c
    """
    new = [passage for passage in ranked if passage.id not in shown]
    spare = limit - sum(passage.id in needed for passage in new)
    kept = []
    for passage in new:
        if passage.id in needed:
            kept.append(passage)
        elif spare > 0:
            spare -= 1
            kept.append(passage)
    return tuple(kept)


def _each_step(row: Row, read: Callable[[Row], Step]) -> Iterator[Step]:
    for number, step in enumerate(get_field(row, "steps", list), 1):
        if not isinstance(step, dict):
            raise FieldError(f"step {number} must be an object; got {kind_of(step)}")
        try:
            yield read(step)
        except FieldError as error:
            raise FieldError(f"step {number}: {error}") from error


def _passages(rows: Iterable[Any]) -> tuple[Passage, ...]:
    passages = []
    for row in rows:
        if not isinstance(row, dict):
            raise FieldError(f"passages must be objects {{id, contents}}; got {kind_of(row)}")
        passages.append(passage_from_dict(row))
    return tuple(passages)


def trajectory_to_dict(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as a JSON object: question, status, steps with passages, but no samples.

    `read_trajectories` can read it, too, where the trajectory is answered and well formed.
    """
    steps = []
    for step in trajectory.steps:
        row: dict[str, Any] = {"analysis": step.analysis}
        if step.query is not None:
            row |= {"query": step.query, "passages": [passage_to_dict(passage) for passage in step.passages]}
        if step.answer is not None:
            row["answer"] = step.answer
        if not step.is_well_formed:
            row["is_well_formed"] = False
        steps.append(row)
    return question_to_dict(trajectory.question) | {
        "status": trajectory.status.name,
        "sample_index": trajectory.sample_index,
        "steps": steps,
    }

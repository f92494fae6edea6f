"""Questions, passages and trajectories as FlashRAG JSONL: strict reading, atomic writing.

Every fault of a file is a `UserError` of one line: `file:line: what was expected; what came`.
The layout is that of github.com/RUC-NLPIR/FlashRAG; HotpotQA, 2Wiki, MuSiQue and others come in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from r3rag_jax.errors import UserError
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

Item = TypeVar("Item", Question, Passage, Trajectory)
_MISSING = object()


# ---------------------------------------------------------------------------------------- reading


def read_questions(path: str | Path) -> list[Question]:
    """Reads lines `{id, question, golden_answers, metadata?}`; UserError on the first fault."""
    return _read(path, question_from_dict)


def read_passages(path: str | Path) -> list[Passage]:
    """Reads lines `{id, contents}` or `{id, title, text}`; UserError on the first fault."""
    return _read(path, passage_from_dict)


def read_trajectories(path: str | Path, corpus: Mapping[str, Passage], passages_per_step: int) -> list[Trajectory]:
    """Reads a teacher's trajectories, without samples, with the documents a rollout would show.

    A line is `{id, question, golden_answers, metadata?, steps}`; a step is `{analysis, query, …}`,
    the last one `{analysis, answer}`. A query step names its documents, best first, by
    `retrieved_ids` or holds them as `passages: [{id, contents}, …]`; `passage_ids` are those that
    the step is after. `sample_index` (0 where missing) tells trajectories of one question apart.
    As in a rollout, passages already shown are dropped and the next ones fill up.

    Args:
        corpus: passage id -> passage; may be empty when the steps hold their passages.
        passages_per_step: most documents of a step; exceeded only by `passage_ids` alone.

    Raises:
        UserError: naming file and line, also for an id that the corpus does not hold.
    """
    if passages_per_step < 1:
        raise UserError(f"passages_per_step must be at least 1; got {passages_per_step}")
    return _read(path, lambda row: teacher_trajectory_from_dict(row, corpus, passages_per_step))


def _read(path: str | Path, parse: Callable[[Mapping[str, Any]], Item]) -> list[Item]:
    """Parses every line; places a fault, refuses a repeated id and a file without rows."""
    items: list[Item] = []
    first_seen: dict[tuple[str, int], int] = {}
    for number, row in read_rows(path):
        try:
            item = parse(row)
        except _Fault as fault:
            raise UserError(f"{path}:{number}: {fault}") from fault
        key = (item.question.id, item.sample_index) if isinstance(item, Trajectory) else (item.id, 0)
        if key in first_seen:
            raise UserError(f"{path}:{number}: ids must be unique; {key[0]!r} is also on line {first_seen[key]}")
        first_seen[key] = number
        items.append(item)
    if not items:
        raise UserError(f"{path}: expected at least one JSON object, one per line; the file holds none")
    return items


def read_rows(path: str | Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields (line number from 1, JSON object) of every line that is not blank; else UserError."""
    try:
        with open(path, "rb") as file:  # bytes: a line that is not UTF-8 must not hide its number
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(path, number, line)
    except OSError as error:
        raise UserError(f"{path}: expected a readable JSONL file; {error.strerror}") from error


def _object(path: str | Path, number: int, line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\ud" in line.lower():  # a lone half of a surrogate pair: no tokenizer takes it
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number}: expected UTF-8; got byte {line[error.start]:#04x} at column {error.start + 1}"
        ) from error
    except UnicodeEncodeError as error:
        raise UserError(f"{path}:{number}: expected Unicode text; got a lone surrogate escape") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: expected one JSON object per line; {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: expected a JSON object; got {_kind(row)}")
    return row


# ------------------------------------------------------------------------------ dict -> dataclass


class _Fault(ValueError):
    """What is wrong with a row; the reader adds file and line."""


def question_from_dict(row: Mapping[str, Any]) -> Question:
    """Reads `{id, question, golden_answers, metadata?}`; ValueError names the field at fault."""
    answers = _field(row, "golden_answers", list)
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise _Fault(f"golden_answers must be a list of one or more texts; got {_show(answers)}")
    return Question(
        id=_id(row, "id"),
        question=_text(row, "question"),
        golden_answers=tuple(answers),
        metadata=_field(row, "metadata", dict, default=None) or {},
    )


def passage_from_dict(row: Mapping[str, Any]) -> Passage:
    """Reads `{id, contents}` or `{id, title, text}`; ValueError names the field at fault."""
    if "contents" not in row and "text" in row:
        contents = f'"{_field(row, "title", str)}"\n{_text(row, "text")}'
    else:
        contents = _text(row, "contents")
    return Passage(id=_id(row, "id"), contents=contents)


def trajectory_from_dict(row: Mapping[str, Any]) -> Trajectory:
    """Inverse of `trajectory_to_dict`; ValueError names the field at fault."""
    name = _field(row, "status", str)
    if name not in Status.__members__:
        raise _Fault(f"status must be one of {', '.join(Status.__members__)}; got {name!r}")
    return Trajectory(
        question=question_from_dict(row),
        steps=tuple(_each_step(row, _recorded_step)),
        status=Status[name],
        sample_index=_field(row, "sample_index", int),
    )


def _recorded_step(row: Mapping[str, Any]) -> Step:
    is_well_formed = _field(row, "is_well_formed", bool, default=True)
    query, answer = (_field(row, name, str, default=None) for name in ("query", "answer"))
    if is_well_formed and (query is None) == (answer is None):
        raise _Fault("a well-formed step must hold either a query or an answer")
    return Step(
        analysis=_field(row, "analysis", str),
        query=query,
        answer=answer,
        passages=_passages(_field(row, "passages", list, default=None) or []),
        is_well_formed=is_well_formed,
    )


def teacher_trajectory_from_dict(
    row: Mapping[str, Any], corpus: Mapping[str, Passage], passages_per_step: int
) -> Trajectory:
    """Reads one line as `read_trajectories` does; ValueError names the step and field at fault."""
    shown: set[str] = set()  # ids of the passages of earlier steps

    def read_step(step: Mapping[str, Any]) -> Step:
        analysis = _text(step, "analysis")
        if ("query" in step) == ("answer" in step):
            raise _Fault("a step must hold either a query or an answer")
        if "answer" in step:
            return Step(analysis=analysis, answer=_text(step, "answer"))
        passages = _choose(*_documents(step, corpus), shown, passages_per_step)
        shown.update(passage.id for passage in passages)
        return Step(analysis=analysis, query=_text(step, "query"), passages=passages)

    steps = tuple(_each_step(row, read_step))
    if not steps or [step.answer is not None for step in steps] != [False] * (len(steps) - 1) + [True]:
        raise _Fault("steps must end with the only one that holds an answer")
    return Trajectory(
        question=question_from_dict(row),
        steps=steps,
        status=Status.ANSWERED,
        sample_index=_field(row, "sample_index", int, default=0),
    )


def _documents(step: Mapping[str, Any], corpus: Mapping[str, Passage]) -> tuple[list[Passage], set[str]]:
    """The passages of a query step, best first, and the ids that must stay among them."""
    if not {"passages", "retrieved_ids", "passage_ids"} & step.keys():
        raise _Fault("a query step must hold passages, retrieved_ids or passage_ids; got none of them")
    inline = {passage.id: passage for passage in _passages(_field(step, "passages", list, default=None) or [])}
    needed = _ids(step, "passage_ids")
    order = dict.fromkeys([*inline, *_ids(step, "retrieved_ids"), *needed])  # keeps the first of equals
    found = []
    for passage_id in order:
        try:
            found.append(inline.get(passage_id) or corpus[passage_id])
        except KeyError:
            raise _Fault(f"passage ids must be in the corpus of {len(corpus)} passages; got {passage_id!r}") from None
    return found, set(needed)


def _choose(ranked: Sequence[Passage], needed: set[str], shown: set[str], limit: int) -> tuple[Passage, ...]:
    """The best `limit` passages not yet shown, in rank order, with room made for every needed one.

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


def _each_step(row: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Step]) -> Iterator[Step]:
    for number, step in enumerate(_field(row, "steps", list), 1):
        if not isinstance(step, dict):
            raise _Fault(f"step {number} must be an object; got {_kind(step)}")
        try:
            yield read(step)
        except _Fault as fault:
            raise _Fault(f"step {number}: {fault}") from fault


def _passages(rows: Iterable[Any]) -> tuple[Passage, ...]:
    passages = []
    for row in rows:
        if not isinstance(row, dict):
            raise _Fault(f"passages must be objects {{id, contents}}; got {_kind(row)}")
        passages.append(passage_from_dict(row))
    return tuple(passages)


# ---------------------------------------------------------------------------------- typed fields


def _field(row: Mapping[str, Any], name: str, kind: type, default: Any = _MISSING) -> Any:
    """row[name], which must be a `kind`; with a default it may also be missing or null."""
    value = row.get(name, _MISSING)
    if default is not _MISSING and (value is _MISSING or value is None):
        return default
    if value is _MISSING:
        raise _Fault(f"expected a field {name!r}; got the fields {sorted(row)}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _Fault(f"{name} must be {_KINDS[kind]}; got {_show(value)}")
    return value


def _text(row: Mapping[str, Any], name: str) -> str:
    text = _field(row, name, str)
    if not text.strip():
        raise _Fault(f"{name} must not be blank; got {text!r}")
    return text


def _id(row: Mapping[str, Any], name: str) -> str:
    """An id is a text; whole numbers, which some corpora use, are taken as their decimal text."""
    value = row.get(name)
    return str(value) if type(value) is int else _text(row, name)


def _ids(row: Mapping[str, Any], name: str) -> list[str]:
    values = _field(row, name, list, default=None) or []
    return [_id({name: value}, name) for value in values]


_KINDS = {
    str: "a text",
    list: "a list",
    dict: "an object",
    int: "a whole number",
    bool: "true or false",
}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), json.dumps(value))


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------------------------------- writing


def question_to_dict(question: Question) -> dict[str, Any]:
    """The FlashRAG object of a question."""
    return {
        "id": question.id,
        "question": question.question,
        "golden_answers": list(question.golden_answers),
        "metadata": dict(question.metadata),
    }


def trajectory_to_dict(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as a JSON object: question, status, steps with passages; samples are left out.

    An answered, well-formed one is also a line that `read_trajectories` takes.
    """
    steps = []
    for step in trajectory.steps:
        row: dict[str, Any] = {"analysis": step.analysis}
        if step.query is not None:
            row |= {
                "query": step.query,
                "passages": [{"id": p.id, "contents": p.contents} for p in step.passages],
            }
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


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line; the file appears whole or, on failure, stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""Questions and passages in FlashRAG's JSONL layout (github.com/RUC-NLPIR/FlashRAG).

HotpotQA, 2WikiMultihopQA, MuSiQue and many other data sets are distributed in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from r3rag_jax.data.jsonl import FieldError, Row, get_field, get_id, get_text, is_id, read_all, read_parsed, show
from r3rag_jax.data.records import STOP, OnError, Records
from r3rag_jax.types import Passage, Question


def read_questions(path: str | Path, on_error: OnError = STOP) -> Records[Question]:
    """Read lines `{id, question, golden_answers, metadata?}`.

    Raises:
        UserError: as `jsonl.read_all`; names file and line of the first fault.
    """
    return read_all(path, question_from_dict, lambda question: question.id, on_error)


def read_passages(path: str | Path, on_error: OnError = STOP) -> Records[Passage]:
    """Read lines `{id, contents}` or `{id, title, text}`.

    Raises:
        UserError: as `jsonl.read_all`; names file and line of the first fault.
    """
    return read_all(path, passage_from_dict, lambda passage: passage.id, on_error)


def iterate_passages(path: str | Path, on_error: OnError = STOP) -> Iterator[Passage]:
    """As `read_passages`, with one passage in memory at a time; ids are not checked to be unique."""
    return (passage for _, passage in read_parsed(path, passage_from_dict, on_error))


def question_from_dict(row: Row) -> Question:
    """Parse `{id, question, golden_answers, metadata?}`; a FieldError names the field at fault."""
    answers = get_field(row, "golden_answers", list)
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise FieldError(f"golden_answers must be a list of one or more texts; got {show(answers)}")
    return Question(
        id=get_id(row, "id"),
        question=get_text(row, "question"),
        golden_answers=tuple(answers),
        metadata=_metadata(row),
    )


def _metadata(row: Row) -> dict[str, Any]:
    """The field `metadata`; what this package reads of it has the right type, or is left out where it is null or ''.

    `type` (a text) and `unseen` (true or false) name groups of an evaluation; `supporting_ids` is a list of ids of
    passages. All other names are kept as they are.
    """
    metadata = dict(get_field(row, "metadata", dict, default=None) or {})
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "type": ("a text", lambda value: isinstance(value, str)),
        "unseen": ("true or false", lambda value: isinstance(value, bool)),
        "supporting_ids": ("a list of ids", lambda value: isinstance(value, list) and all(map(is_id, value))),
    }
    for name, (what, is_right) in checks.items():
        if metadata.get(name) in (None, ""):
            metadata.pop(name, None)
        elif not is_right(metadata[name]):
            raise FieldError(f"metadata.{name} must be {what}; got {show(metadata[name])}")
    return metadata


def question_to_dict(question: Question) -> dict[str, Any]:
    """Inverse of `question_from_dict`."""
    return {
        "id": question.id,
        "question": question.question,
        "golden_answers": list(question.golden_answers),
        "metadata": dict(question.metadata),
    }


def passage_from_dict(row: Row) -> Passage:
    """Parse `{id, contents}` or `{id, title, text}`; a FieldError names the field at fault."""
    if "contents" not in row and "text" in row:
        contents = f'"{get_field(row, "title", str)}"\n{get_text(row, "text")}'
    else:
        contents = get_text(row, "contents")
    return Passage(id=get_id(row, "id"), contents=contents)


def passage_to_dict(passage: Passage) -> dict[str, str]:
    """Inverse of `passage_from_dict`."""
    return {"id": passage.id, "contents": passage.contents}

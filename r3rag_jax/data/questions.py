"""Questions and passages in FlashRAG's JSONL layout (github.com/RUC-NLPIR/FlashRAG).

HotpotQA, 2WikiMultihopQA, MuSiQue and many other data sets are distributed in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r3rag_jax.data.jsonl import FieldError, Row, get_field, get_id, get_text, read_all, read_parsed, show
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
        metadata=get_field(row, "metadata", dict, default=None) or {},
    )


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

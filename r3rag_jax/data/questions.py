"""Files of questions and of passages: FlashRAG's layout, and those in which data sets are released (`readers/`).

field of a passage   instead of it
id                   _id; a text or a whole number
contents             text, with or without title
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r3rag_jax.config.data import split_source
from r3rag_jax.data.fields import Row, first_name, get_field, get_id, get_text
from r3rag_jax.data.jsonl import read_all, read_parsed
from r3rag_jax.data.readers.flashrag import ID_FIELDS
from r3rag_jax.data.readers.layouts import parse_question
from r3rag_jax.data.readers.multi_hop import with_aliases
from r3rag_jax.data.records import STOP, OnError, Records
from r3rag_jax.types import Passage, Question

CONTENT_FIELDS = ("contents", "text")  # names of a field, the first one that a record has


def read_questions(source: str | Path, on_error: OnError = STOP) -> Records[Question]:
    """Read a file of questions, or `NAME:FILE`, a file of the data set NAME.

    The layout of each record is told by its fields; with a name, it must be one of that data set.

    Raises:
        UserError: as `jsonl.read_all`; names file and line of the first fault.
    """
    name, path = split_source(source)
    questions = read_all(
        path, lambda row, line: parse_question(row, line, name), lambda question: question.id, on_error
    )
    return with_aliases(questions, Path(path))


def read_passages(path: str | Path, on_error: OnError = STOP) -> Records[Passage]:
    """Read records `{id, contents}` or `{id, title?, text}`.

    Raises:
        UserError: as `jsonl.read_all`; names file and line of the first fault.
    """
    return read_all(path, lambda row, _: passage_from_dict(row), lambda passage: passage.id, on_error)


def iterate_passages(path: str | Path, on_error: OnError = STOP) -> Iterator[Passage]:
    """As `read_passages`, with one passage in memory at a time; ids are not checked to be unique."""
    return (passage for _, passage in read_parsed(path, passage_from_dict, on_error))


def identity(question: Question) -> str:
    """What questions that are the same have in common: the text, regardless of case, blanks and closing punctuation.

    Texts are compared in one Unicode form (NFKC). Ids do not tell: every data set numbers its questions from 0.
    """
    return normal_text(question.question)


def normal_text(text: str) -> str:
    """A text for comparisons: in one Unicode form, without case, surplus blanks and closing punctuation."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.rstrip(" ?!.。") or text


def question_to_dict(question: Question) -> dict[str, Any]:
    """Inverse of `question_from_dict`."""
    return {
        "id": question.id,
        "question": question.question,
        "golden_answers": list(question.golden_answers),
        "metadata": dict(question.metadata),
    }


def passage_from_dict(row: Row) -> Passage:
    """Parse `{id, contents}` or `{id, title?, text}`; a FieldError names the field at fault."""
    name = first_name(row, CONTENT_FIELDS)
    contents = get_text(row, name)
    if name == "text" and (title := (get_field(row, "title", str, default="") or "").strip()):
        contents = f'"{title}"\n{contents}'
    return Passage(id=get_id(row, first_name(row, ID_FIELDS)), contents=contents)


def passage_to_dict(passage: Passage) -> dict[str, str]:
    """Inverse of `passage_from_dict`."""
    return {"id": passage.id, "contents": passage.contents}

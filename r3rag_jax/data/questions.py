"""Questions and passages in FlashRAG's layout (github.com/RUC-NLPIR/FlashRAG).

HotpotQA, 2WikiMultihopQA, MuSiQue and many other data sets are distributed in it. What the files of others hold in its
place is read too:

    field            instead of it
    id               _id; a text or a whole number
    golden_answers   answers or answer, with answer_aliases; a list or one alone, of texts, numbers, true and false
    metadata         null or an empty list for none
    contents         text, with or without title

Another layout is read by another function from a record to a Question, which `jsonl.read_all` takes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from r3rag_jax.data.fields import FieldError, Row, first_name, get_field, get_id, get_text, is_id, show
from r3rag_jax.data.jsonl import read_all, read_parsed
from r3rag_jax.data.records import STOP, OnError, Records
from r3rag_jax.types import Passage, Question

# Names of a field, the first one that a record has; those after the first are other data sets'.
ID_FIELDS = ("id", "_id")
ANSWER_FIELDS = ("golden_answers", "answers", "answer")
CONTENT_FIELDS = ("contents", "text")


def read_questions(path: str | Path, on_error: OnError = STOP) -> Records[Question]:
    """Read records `{id, question, golden_answers, metadata?}`.

    Raises:
        UserError: as `jsonl.read_all`; names file and line of the first fault.
    """
    return read_all(path, question_from_dict, lambda question: question.id, on_error)


def read_passages(path: str | Path, on_error: OnError = STOP) -> Records[Passage]:
    """Read records `{id, contents}` or `{id, title?, text}`.

    Raises:
        UserError: as `jsonl.read_all`; names file and line of the first fault.
    """
    return read_all(path, passage_from_dict, lambda passage: passage.id, on_error)


def iterate_passages(path: str | Path, on_error: OnError = STOP) -> Iterator[Passage]:
    """As `read_passages`, with one passage in memory at a time; ids are not checked to be unique."""
    return (passage for _, passage in read_parsed(path, passage_from_dict, on_error))


def identity(question: Question) -> str:
    """What questions that are the same have in common: the text, regardless of case, blanks and closing punctuation.

    Texts are compared in one Unicode form (NFKC). Ids do not tell: every data set numbers its questions from 0.
    """
    text = " ".join(unicodedata.normalize("NFKC", question.question).casefold().split())
    return text.rstrip(" ?!.。") or text


def question_from_dict(row: Row) -> Question:
    """Parse `{id, question, golden_answers, metadata?}`; a FieldError names the field at fault."""
    return Question(
        id=get_id(row, first_name(row, ID_FIELDS)),
        question=get_text(row, "question"),
        golden_answers=_golden_answers(row),
        metadata=_metadata(row),
    )


def _golden_answers(row: Row) -> tuple[str, ...]:
    """The accepted answers, as texts."""
    name = first_name(row, ANSWER_FIELDS)
    value = row[name]
    texts_of = [_answer_texts(answer) for answer in (value if isinstance(value, list) else [value])]
    if not texts_of or not all(texts_of):
        raise FieldError(f"{name} must be one or more texts, numbers or truth values; got {show(value)}")
    answers = [text for texts in texts_of for text in texts]
    if name != ANSWER_FIELDS[0]:
        aliases = get_field(row, "answer_aliases", list, default=None) or []
        if not all(isinstance(alias, str) and alias.strip() for alias in aliases):
            raise FieldError(f"answer_aliases must be a list of texts; got {show(aliases)}")
        answers += aliases
    return tuple(answers)


def _answer_texts(value: Any) -> list[str]:
    """One answer as texts; none if it is none. True is both yes and true; 1986.0 is what tables make of 1986."""
    if isinstance(value, bool):
        return ["yes", "true"] if value else ["no", "false"]
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, int | float) and isfinite(value):
        return [str(int(value) if value == int(value) else value)]
    return []


def _metadata(row: Row) -> dict[str, Any]:
    """The field `metadata`; what this package reads of it has the right type, or is left out where it is null or ''.

    `type` (a text) and `unseen` (true or false) name groups of an evaluation; `supporting_ids` is a list of ids of
    passages. All other names are kept as they are.
    """
    if row.get("metadata") == []:  # how some languages write an empty object
        return {}
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
    """Parse `{id, contents}` or `{id, title?, text}`; a FieldError names the field at fault."""
    name = first_name(row, CONTENT_FIELDS)
    contents = get_text(row, name)
    if name == "text" and (title := (get_field(row, "title", str, default="") or "").strip()):
        contents = f'"{title}"\n{contents}'
    return Passage(id=get_id(row, first_name(row, ID_FIELDS)), contents=contents)


def passage_to_dict(passage: Passage) -> dict[str, str]:
    """Inverse of `passage_from_dict`."""
    return {"id": passage.id, "contents": passage.contents}

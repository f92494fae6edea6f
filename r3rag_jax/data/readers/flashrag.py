"""Questions in FlashRAG's layout (github.com/RUC-NLPIR/FlashRAG), in which many data sets are distributed.

What the files of others hold in its place is read too:

    field            instead of it
    id               _id; a text or a whole number
    golden_answers   answers or answer, with answer_aliases; a list or one alone, of texts, numbers, true and false
    metadata         null or an empty list for none

`metadata` may hold the evidence as HotpotQA, 2WikiMultiHopQA and MuSiQue write it: `decomposition.py` says what becomes
of it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

from r3rag_jax.data.decomposition import gold_evidence
from r3rag_jax.data.fields import FieldError, Row, first_name, get_field, get_id, get_text, get_texts, is_id, show
from r3rag_jax.types import Question

# Names of a field, the first one that a record has; those after the first are other data sets'.
ID_FIELDS = ("id", "_id")
ANSWER_FIELDS = ("golden_answers", "answers", "answer")
PARAGRAPHS = ("context", "paragraphs", "question_decomposition")  # of metadata: texts of which the evidence is kept


def question_from_dict(row: Row, default_id: str | None = None) -> Question:
    """Parse `{id, question, golden_answers, metadata?}`; a FieldError names the field at fault.

    Args:
        default_id: of a record without one; None refuses such records.
    """
    has_id = default_id is None or any(row.get(name) is not None for name in ID_FIELDS)
    return Question(
        id=get_id(row, first_name(row, ID_FIELDS)) if has_id else str(default_id),
        question=get_text(row, "question"),
        golden_answers=golden_answers(row),
        metadata=_metadata(row),
    )


def golden_answers(row: Row) -> tuple[str, ...]:
    """The accepted answers of a record, as texts; a FieldError says that there are none."""
    name = first_name(row, ANSWER_FIELDS)
    value = row[name]
    texts_of = [_answer_texts(answer) for answer in (value if isinstance(value, list) else [value])]
    if not texts_of or not all(texts_of):
        raise FieldError(f"{name} must be one or more texts, numbers or truth values; got {show(value)}")
    answers = [text for texts in texts_of for text in texts]
    if name != ANSWER_FIELDS[0]:
        answers += get_texts(row, "answer_aliases")
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
    passages; the evidence of HotpotQA, 2WikiMultiHopQA and MuSiQue takes the shape of `decomposition.py`, without the
    paragraphs that come with it. All other names are kept as they are.
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
    if gold := gold_evidence(metadata):
        metadata = {name: value for name, value in metadata.items() if name not in PARAGRAPHS} | gold
    return metadata

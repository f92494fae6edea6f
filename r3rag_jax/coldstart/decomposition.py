"""Gold decompositions: the hops that a question comes with, in the forms of several data sets.

    metadata.decomposition            wikihop: [{"sub_question": "Who wrote Das Kapital?", "answer": "Karl Marx",
                                      "passage_id": "12"}, …]
                                      the encyclopedia: [{"entity": …, "relation": …, "answer": …, …}, …]
    metadata.question_decomposition   MuSiQue: [{"question": "Green >> performer", "answer": "Steve Hillage"},
                                      {"question": "#1 >> spouse", "answer": "Miquette Giraudy"}]
    metadata.evidences                2WikiMultiHopQA: [["Das Kapital", "author", "Karl Marx"], …]

`#1` stands for the answer of the first hop; `Green >> performer` and a triple ask for a relation of an entity.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from r3rag_jax.data.fields import FieldError, get_field, get_id, get_text, show
from r3rag_jax.rewards.answer import normalize_answer
from r3rag_jax.types import Passage, Question

FORMS = ("decomposition", "question_decomposition", "evidences")
_REFERENCE = re.compile(r"#(\d+)")
_RELATION_MARK = ">>"
# Words of an English question that a search by keywords does without, besides what the question asks about.
_FUNCTION_WORDS = frozenset(
    "a an and are at by did do does for from had has have how in is it many much of on or the their to was were what "
    "when where which who whom whose with".split()
)


@dataclasses.dataclass(frozen=True)
class Hop:
    """One hop of a question.

    Fields:
        ask: what has to be found out, as a question.
        fact: the same with its answer, as a sentence.
        queries: wordings of the search, the most natural one first; none holds the answer.
        passage_id: the passage that states the fact; None where the data set does not say.
    """

    ask: str
    fact: str
    answer: str
    queries: tuple[str, ...]
    passage_id: str | None = None

    def is_stated_in(self, passage: Passage, is_id_known: bool) -> bool:
        """Whether a passage states the fact: it is the one that the data set names, or it holds the answer's words.

        Words decide where the data set names none, or one that the corpus does not have (`is_id_known` False).
        """
        if self.passage_id is not None and is_id_known:
            return passage.id == self.passage_id
        words = set(normalize_answer(self.answer).split())
        return words <= set(normalize_answer(passage.contents).split())


def hops_of(question: Question) -> tuple[Hop, ...]:
    """The hops of a question.

    Raises:
        FieldError: it has none, or one is malformed.
    """
    name = next((name for name in FORMS if question.metadata.get(name)), None)
    if name is None:
        raise FieldError(f"metadata must hold {', '.join(FORMS[:-1])} or {FORMS[-1]}; got {sorted(question.metadata)}")
    hops: list[Hop] = []
    for number, row in enumerate(get_field(question.metadata, name, list), 1):
        try:
            hops.append(_of_triple(row) if isinstance(row, list) else _of_object(row, hops))
        except FieldError as error:
            raise FieldError(f"metadata.{name}, hop {number}: {error}") from None
    return tuple(hops)


def _of_object(row: Any, earlier: Sequence[Hop]) -> Hop:
    if not isinstance(row, dict):
        raise FieldError(f"expected an object or [subject, relation, object]; got {show(row)}")
    answer = get_text(row, "answer")
    passage_id = get_id(row, "passage_id") if row.get("passage_id") is not None else None
    if "relation" in row:
        return _related(get_text(row, "entity"), get_text(row, "relation"), answer, passage_id)
    text = _REFERENCE.sub(
        lambda match: _referred(int(match[1]), earlier),
        get_text(row, "sub_question" if "sub_question" in row else "question"),
    )
    if _RELATION_MARK in text:
        entity, _, relation = text.partition(_RELATION_MARK)
        return _related(entity.strip(), relation.strip(), answer, passage_id)
    ask = text if text.endswith("?") else f"{text}?"
    keywords = " ".join(word for word in ask.rstrip("?").split() if word.lower() not in _FUNCTION_WORDS)
    queries = dict.fromkeys([ask, keywords or ask])
    return Hop(ask, f'The answer to "{ask}" is {answer}.', answer, tuple(queries), passage_id)


def _of_triple(row: list[Any]) -> Hop:
    if len(row) != 3 or not all(isinstance(part, str) and part.strip() for part in row):
        raise FieldError(f"expected [subject, relation, object], three texts; got {show(row)}")
    return _related(row[0].strip(), row[1].strip(), row[2].strip(), None)


def _related(entity: str, relation: str, answer: str, passage_id: str | None) -> Hop:
    ask = f"What is the {relation} of {entity}?"
    fact = f"The {relation} of {entity} is {answer}."
    return Hop(ask, fact, answer, (ask, f"{entity} {relation}", entity), passage_id)


def _referred(number: int, earlier: Sequence[Hop]) -> str:
    if not 1 <= number <= len(earlier):
        raise FieldError(f"#{number} must stand for one of the {len(earlier)} hops before")
    return earlier[number - 1].answer

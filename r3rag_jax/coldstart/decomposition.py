"""What a gold decomposition asks, says and searches at each of its hops."""

from __future__ import annotations

import dataclasses
from typing import Any

from r3rag_jax.data.decomposition import decomposition_of, relation_question
from r3rag_jax.data.fields import FieldError
from r3rag_jax.rewards.answer import normalize_answer
from r3rag_jax.types import Passage, Question

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
        answer: its answer.
        passage_id: the passage that states it; None where the data set does not say.
    """

    ask: str
    answer: str
    passage_id: str | None = None

    @property
    def fact(self) -> str:
        """Question and answer as a sentence."""
        return f'The answer to "{self.ask}" is {self.answer}.'

    @property
    def queries(self) -> tuple[str, ...]:
        """Wordings of the search, the most natural one first: the question, its keywords, its names."""
        words = self.ask.rstrip("?").split()
        keywords = [word for word in words if word.lower() not in _FUNCTION_WORDS]
        names = [word for word in keywords if not word[0].islower()]
        return tuple(dict.fromkeys(" ".join(found) for found in (self.ask.split(), keywords, names) if found))

    def is_stated_in(self, passage: Passage, is_id_known: bool) -> bool:
        """Whether a passage states the fact: it is the one that the data set names, or it holds the answer's words.

        Words decide where the data set names none, or one that the corpus does not have (`is_id_known` False).
        """
        if self.passage_id is not None and is_id_known:
            return passage.id == self.passage_id
        words = set(normalize_answer(self.answer).split())
        return words <= set(normalize_answer(passage.contents).split())


def hops_of(question: Question) -> tuple[Hop, ...]:
    """The hops of a question, of a data set's shape (`data/decomposition.py`) or of the encyclopedia's.

    Raises:
        FieldError: it has none, or they have another shape.
    """
    rows: Any = question.metadata.get("decomposition")
    if not rows:
        raise FieldError(f"expected metadata.decomposition; got {sorted(question.metadata)}")
    if isinstance(rows, list) and all(isinstance(row, dict) and "relation" in row for row in rows):
        return tuple(
            Hop(relation_question(row["entity"], row["relation"]), row["answer"], row["passage_id"]) for row in rows
        )
    return tuple(Hop(_as_question(hop.sub_question), hop.answer, hop.passage_id) for hop in decomposition_of(question))


def _as_question(text: str) -> str:
    return text if text.endswith("?") else f"{text}?"

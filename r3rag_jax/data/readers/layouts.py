"""The layouts of questions that are read, by the data set and the fields that tell them: a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from r3rag_jax.data.fields import FieldError, Row
from r3rag_jax.data.readers import multi_hop, single_hop
from r3rag_jax.data.readers.flashrag import ID_FIELDS, question_from_dict
from r3rag_jax.types import Question


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout in which a data set is distributed; a record that has all its fields is of it."""

    data_set: str  # a name of `config.data.DATA_SETS`
    fields: frozenset[str]
    parse: Callable[[Row, str | None], Question]  # record, id of one without (None: refuse it); raises FieldError


def _layout(data_set: str, fields: str, parse: Callable[[Row, str | None], Question]) -> Layout:
    return Layout(data_set, frozenset(fields.split()), parse)


# The first one of which a record has all fields is the record's.
LAYOUTS = (
    _layout("flashrag", "question golden_answers", question_from_dict),
    _layout("musique", "question answer question_decomposition", multi_hop.question_from_row),
    _layout("2wikimultihopqa", "question answer evidences", multi_hop.question_from_row),
    _layout("hotpotqa", "question answer supporting_facts", multi_hop.question_from_row),
    _layout("nq", "question_text annotations", single_hop.nq_released),
    _layout("nq", "question document annotations", single_hop.nq_hub),
    _layout("nq", "question answers positive_ctxs", single_hop.dpr),
    _layout("triviaqa", "question answers positive_ctxs", single_hop.dpr),
    _layout("triviaqa", "Question QuestionId Answer", single_hop.trivia_released),
    _layout("triviaqa", "question question_id answer", single_hop.trivia_hub),
    _layout("popqa", "question possible_answers", single_hop.popqa),
    _layout("bamboogle", "Question Answer", single_hop.bamboogle),
)


def parse_question(row: Row, line: int, data_set: str = "") -> Question:
    """Parse a record in the layout that its fields tell; in FlashRAG's, with `answer` or `answers`, if they tell none.

    Args:
        line: names a record that has no id: `nq_17`.
        data_set: the record must be in a layout of it, in FlashRAG's, or in none; "" = not known, and then a record in
            none must have an id.

    Raises:
        FieldError: the record is in a layout of another data set, or breaks a rule of its own.
    """
    found = [layout for layout in LAYOUTS if layout.fields <= row.keys()]
    if not found:
        if not data_set and not any(name in row for name in ID_FIELDS):
            raise FieldError(
                f"expected a record with an id, or of a known data set; got the fields {sorted(row)}: "
                "give the data set of a file without ids as NAME:FILE"
            )
        return question_from_dict(row, f"{data_set}_{line}" if data_set else None)
    parses = [layout.parse for layout in found if layout.data_set == data_set]
    parse = parses[0] if parses else found[0].parse
    own = [layout for layout in LAYOUTS if layout.data_set in (data_set, "flashrag")]
    if data_set and parse not in [layout.parse for layout in own]:
        raise FieldError(
            f"expected a record of {data_set}, with the fields "
            f"{' or '.join(str(sorted(layout.fields)) for layout in own)}; got one of {found[0].data_set}"
        )
    name = data_set or (found[0].data_set if parse is not question_from_dict else "")
    return parse(row, f"{name}_{line}" if name else None)

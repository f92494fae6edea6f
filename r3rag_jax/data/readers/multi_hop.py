"""HotpotQA, 2WikiMultiHopQA and MuSiQue as their authors release them, and as the hub's Parquet copies hold them.

Released: hotpotqa.github.io (`hotpot_train_v1.1.json`, …), github.com/Alab-NII/2wikimultihop (`data_ids_april7.zip`:
`train.json`, … and `id_aliases.json`), github.com/StonyBrookNLP/musique (`musique_ans_v1.0_train.jsonl`, …).
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from r3rag_jax.data.decomposition import gold_evidence
from r3rag_jax.data.fields import FieldError, Row, first_name, get_field, get_id, get_text, get_texts
from r3rag_jax.data.jsonl import read_rows
from r3rag_jax.data.readers.flashrag import ID_FIELDS, golden_answers
from r3rag_jax.data.records import Records
from r3rag_jax.types import Question

ALIASES = "id_aliases.json"  # {Q_id, aliases, demonyms} a line: names of the entities that answer 2WikiMultiHopQA


def question_from_row(row: Row, default_id: str | None) -> Question:
    """Parse `{_id or id, question, answer, answer_aliases?, type?, level?, …}` with the evidence of its data set.

    MuSiQue's ids name the type: `3hop1__…` is of type `3hop1`. The paragraphs are left out: the corpus has them.

    Raises:
        FieldError: a field is missing or of another type, or the evidence is in no known shape.
    """
    id = get_id(row, first_name(row, ID_FIELDS))
    metadata: dict[str, Any] = {}
    for name in ("type", "level", "answer_id"):
        if text := get_field(row, name, str, default=None):
            metadata[name] = text
    if found := re.match(r"(\dhop\d?)__", id):
        metadata["type"] = found[1]
    if row.get("answerable") is False:
        metadata["answerable"] = False  # not from the paragraphs of the record
    evidence = gold_evidence(row)
    names = [name for name in ("question_decomposition", "evidences", "supporting_facts") if row.get(name)]
    if names and not evidence:
        raise FieldError(f"{names[0]} must have the shape that its data set releases; got another one")
    return Question(id, get_text(row, "question"), golden_answers(row), {**evidence, **metadata})


def with_aliases(questions: Records[Question], path: Path) -> Records[Question]:
    """Add the other names of the entities that answer 2WikiMultiHopQA's questions, as its official evaluation does.

    Args:
        path: the file of the questions; the names come from `id_aliases.json` beside it, if it is there.
    """
    wanted = {question.metadata["answer_id"] for question in questions if "answer_id" in question.metadata}
    file = path.with_name(ALIASES)
    if not wanted or not file.is_file():
        return questions
    names = {
        id: [*get_texts(row, "aliases"), *get_texts(row, "demonyms")]
        for _, row in read_rows(file)
        if (id := row.get("Q_id")) in wanted
    }

    def named(question: Question) -> Question:
        answers = dict.fromkeys([*question.golden_answers, *names.get(question.metadata.get("answer_id"), ())])
        return dataclasses.replace(question, golden_answers=tuple(answers))

    return questions.map(named)

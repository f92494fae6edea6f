"""Gold decompositions: the sub-questions, one a passage, through which a data set says that a question is answered.

`Question.metadata` holds what the readers found, in one shape for all data sets, and as JSON:

    decomposition      [{sub_question, answer, title?, passage_id?}, …] in the order of the hops. A sub-question names
                       the answers of earlier ones ("Who directed Xawery's film?", never "#1"). `title` is that of the
                       article with the evidence, `passage_id` the id of a passage of the corpus; one of them may be
                       missing, or both. (MuSiQue, 2WikiMultiHopQA, wikihop)
    supporting_titles  titles of the articles with the evidence, each once (HotpotQA, 2WikiMultiHopQA, MuSiQue, PopQA)
    supporting_facts   [[title, number of a sentence from 0], …] (HotpotQA, 2WikiMultiHopQA)
    evidences          [[subject, relation, object], …] (2WikiMultiHopQA)
    hops               how many passages are needed

`decomposition_of` reads the first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from r3rag_jax.data.fields import FieldError, Row, as_rows, get_field, get_id, get_text, is_id, show
from r3rag_jax.json_text import parse_json
from r3rag_jax.types import Question

# Questions for relations of Wikidata, on which 2WikiMultiHopQA and parts of MuSiQue are built.
RELATIONS = {
    "director": "Who directed {}?",
    "author": "Who wrote {}?",
    "performer": "Who performed {}?",
    "composer": "Who composed {}?",
    "producer": "Who produced {}?",
    "screenwriter": "Who wrote the screenplay of {}?",
    "creator": "Who created {}?",
    "founded by": "Who founded {}?",
    "manufacturer": "Who manufactures {}?",
    "publisher": "Who published {}?",
    "owned by": "Who owns {}?",
    "presenter": "Who presents {}?",
    "spouse": "Who was married to {}?",
    "father": "Who was the father of {}?",
    "mother": "Who was the mother of {}?",
    "child": "Who was a child of {}?",
    "sibling": "Who was a sibling of {}?",
    "student of": "Who taught {}?",
    "doctoral advisor": "Who was the doctoral advisor of {}?",
    "date of birth": "When was {} born?",
    "date of death": "When did {} die?",
    "publication date": "When was {} published?",
    "inception": "When was {} founded?",
    "place of birth": "Where was {} born?",
    "place of death": "Where did {} die?",
    "place of burial": "Where was {} buried?",
    "place of detention": "Where was {} detained?",
    "residence": "Where did {} live?",
    "educated at": "Where was {} educated?",
    "headquarters location": "Where are the headquarters of {}?",
    "country of citizenship": "Of which country was {} a citizen?",
    "country of origin": "From which country does {} come?",
    "country": "In which country is {}?",
    "located in the administrative territorial entity": "In which administrative territory is {}?",
    "employer": "For whom did {} work?",
    "award received": "Which award did {} receive?",
    "cause of death": "Of what did {} die?",
    "record label": "Which record label released {}?",
    "has part": "What is a part of {}?",
    "part of": "Of what is {} a part?",
    "instance of": "What is {}?",
    "occupation": "What was the occupation of {}?",
}


@dataclasses.dataclass(frozen=True)
class Hop:
    """One sub-question of a decomposition; `title` and `passage_id` say where its answer stands, where it is known."""

    sub_question: str
    answer: str
    title: str | None = None
    passage_id: str | None = None


def decomposition_of(question: Question) -> tuple[Hop, ...]:
    """The gold decomposition of a question; empty where its data set has none.

    Raises:
        FieldError: `metadata.decomposition` is there in another shape.
    """
    hops = []
    for number, row in enumerate(get_field(question.metadata, "decomposition", list, default=None) or (), 1):
        if not isinstance(row, Mapping):
            raise FieldError(f"metadata.decomposition must be a list of objects; got {show(row)}")
        try:
            title = get_field(row, "title", str, default=None)
            passage_id = None if row.get("passage_id") is None else get_id(row, "passage_id")
            hops.append(Hop(get_text(row, "sub_question"), get_text(row, "answer"), title, passage_id))
        except FieldError as error:
            raise FieldError(f"metadata.decomposition, hop {number}: {error}") from error
    return tuple(hops)


def gold_evidence(row: Row) -> dict[str, Any]:
    """What a record says of its evidence, as metadata in the shape above.

    Args:
        row: a record as its data set releases it, or the metadata of a record of FlashRAG. Of `supporting_facts`,
            `evidences` and `question_decomposition` those that are there in a known shape count.
    """
    found: dict[str, Any] = {}
    facts = _tuples(row.get("supporting_facts"), ("title", "sent_id"))
    triples = [
        [str(item) for item in triple] for triple in _tuples(row.get("evidences"), ("fact", "relation", "entity"))
    ]
    steps = parsed(row.get("question_decomposition"))
    if facts:
        found |= {"supporting_facts": facts, "supporting_titles": list(dict.fromkeys(str(title) for title, _ in facts))}
    if triples:
        found |= {"evidences": triples, "decomposition": from_triples(triples, found.get("supporting_titles", ()))}
    if isinstance(steps, list) and steps and all(isinstance(step, Mapping) for step in steps):
        paragraphs = parsed(row.get("paragraphs"))
        hops = from_steps(steps, paragraphs if isinstance(paragraphs, list) else ())
        titles = list(dict.fromkeys(hop["title"] for hop in hops if "title" in hop))
        found |= {"decomposition": hops, "supporting_titles": titles, "type": row.get("type") or f"{len(hops)}hop"}
    num_hops = len(found.get("decomposition") or found.get("supporting_titles", ()))
    return found | ({"hops": num_hops} if num_hops else {})


def parsed(value: Any) -> Any:
    """A list or object that a table holds as JSON text; other values, and text that is no JSON, as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return parse_json(value)
    except ValueError:
        return value


def _tuples(value: Any, names: Sequence[str]) -> list[list[Any]]:
    """A list of equally long lists, as released, or as an object of one list a name, or a list of objects; else []."""
    value = as_rows(parsed(value), names)
    if not isinstance(value, list):
        return []
    rows = [[row.get(name) for name in names] if isinstance(row, Mapping) else row for row in value]
    is_known = all(isinstance(row, list | tuple) and len(row) == len(names) and all(map(is_id, row)) for row in rows)
    return [list(row) for row in rows] if is_known else []


def relation_question(subject: str, relation: str) -> str:
    """A question for the object of a triple of Wikidata, e.g. ("Emma", "author") -> "Who wrote Emma?"."""
    before, _, after = RELATIONS.get(relation.strip().lower(), f"What is the {relation.strip()} of {{}}?").rpartition(
        "{}"
    )
    return f"{before}{subject.strip()}{after}"


def from_triples(triples: Iterable[Sequence[str]], titles: Sequence[str]) -> list[dict[str, Any]]:
    """The decomposition that triples (subject, relation, object) give, as 2WikiMultiHopQA's `evidences`.

    Args:
        titles: of the articles with the evidence; one that begins with the subject is the triple's, as
            "Polish-Russian War (film)" for the subject "Polish-Russian War".
    """
    hops = []
    for subject, relation, answer in triples:
        hop = {"sub_question": relation_question(subject, relation), "answer": answer}
        start = subject.strip().casefold()
        if title := next((title for title in titles if title.casefold().partition(" (")[0] == start), None):
            hop["title"] = title
        hops.append(hop)
    return hops


def from_steps(steps: Iterable[Row], paragraphs: Iterable[Row]) -> list[dict[str, Any]]:
    """The decomposition of a question of MuSiQue.

    Args:
        steps: `{question, answer, paragraph_support_idx}` each, FlashRAG's with `support_paragraph` in its place. A
            question refers to the answer of step n as #n, and may be written "subject >> relation".
        paragraphs: `{idx, title, …}` each.
    """
    rows = [paragraph for paragraph in paragraphs if isinstance(paragraph, Mapping) and is_id(paragraph.get("idx"))]
    title_of = {paragraph["idx"]: paragraph.get("title") for paragraph in rows}
    hops: list[dict[str, Any]] = []
    for number, step in enumerate(steps, 1):
        try:
            text = _with_answers(get_text(step, "question"), [hop["answer"] for hop in hops])
            answer = get_text(step, "answer")
        except FieldError as error:
            raise FieldError(f"question_decomposition, step {number}: {error}") from error
        subject, arrow, relation = text.partition(" >> ")
        sub_question = relation_question(subject, relation) if arrow else text
        support = step.get("support_paragraph")
        index = step.get("paragraph_support_idx")
        known = title_of.get(index) if is_id(index) else None
        title = support.get("title") if isinstance(support, Mapping) else known
        hop = {"sub_question": sub_question, "answer": answer}
        hops.append(hop | ({"title": title} if title and isinstance(title, str) else {}))
    return hops


def _with_answers(text: str, answers: Sequence[str]) -> str:
    """A text in which #n is replaced by the n-th answer, and stays where there is no such answer."""

    def answer(found: re.Match[str]) -> str:
        number = int(found[1])
        return answers[number - 1] if 1 <= number <= len(answers) else found[0]

    return re.sub(r"#(\d+)", answer, text)

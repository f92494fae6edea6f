"""Gold decompositions: what each hop asks, says and searches."""

from __future__ import annotations

from typing import Any

import pytest

from r3rag_jax.coldstart.decomposition import Hop, hops_of
from r3rag_jax.coldstart.gold import analysis, decomposition_fault
from r3rag_jax.data.decomposition import gold_evidence
from r3rag_jax.types import Passage, Question


def hops(metadata: dict[str, Any]) -> tuple[Hop, ...]:
    return hops_of(Question("q", "Who?", ("x",), metadata))


def test_sub_questions_with_their_passages() -> None:
    row = {"sub_question": "Who wrote the book Das Kapital?", "answer": "Karl Marx", "passage_id": 12}
    [hop] = hops({"decomposition": [row]})
    assert hop == Hop("Who wrote the book Das Kapital?", "Karl Marx", "12")
    assert hop.queries == ("Who wrote the book Das Kapital?", "wrote book Das Kapital", "Das Kapital")
    assert hop.fact == 'The answer to "Who wrote the book Das Kapital?" is Karl Marx.'


def test_questions_as_musique_releases_them() -> None:
    rows = [
        {"id": 460946, "question": "Green >> performer", "answer": "Steve Hillage", "paragraph_support_idx": 10},
        {"id": 294723, "question": "#1 >> spouse", "answer": "Miquette Giraudy", "paragraph_support_idx": 5},
        {"id": 1, "question": "when was #2 born", "answer": "9 February 1953"},
    ]
    found = hops(gold_evidence({"question_decomposition": rows}))
    assert [hop.queries for hop in found] == [
        ("Who performed Green?", "performed Green", "Green"),
        ("Who was married to Steve Hillage?", "married Steve Hillage", "Steve Hillage"),
        ("when was Miquette Giraudy born?", "Miquette Giraudy born", "Miquette Giraudy"),
    ]
    assert {hop.passage_id for hop in found} == {None}


def test_evidences_as_2wiki_releases_them_and_hops_of_the_encyclopedia() -> None:
    [triple] = hops(gold_evidence({"evidences": [["Das Kapital", "author", "Karl Marx"]]}))
    [hop] = hops({"decomposition": [{"entity": "X", "relation": "author", "answer": "Y", "passage_id": "3"}]})
    assert (triple.ask, triple.answer, triple.passage_id) == ("Who wrote Das Kapital?", "Karl Marx", None)
    assert hop == Hop("Who wrote X?", "Y", "3")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "expected metadata.decomposition; got []"),
        ({"decomposition": ["a"]}, "metadata.decomposition must be a list of objects"),
        ({"decomposition": [{"sub_question": "Who?"}]}, "metadata.decomposition, hop 1: expected a field 'answer'"),
        ({"decomposition": "a"}, "decomposition must be a list"),
    ],
)
def test_faults_are_named(metadata: dict[str, Any], words: str) -> None:
    fault = decomposition_fault(Question("q", "Who?", ("x",), metadata))
    assert fault is not None and fault.startswith("coldstart.source=gold needs a decomposition: ") and words in fault


def test_evidence_is_the_named_passage_or_one_with_the_answer() -> None:
    hop = Hop("?", "9 February 1953", "7")
    dated = Passage("8", '"Miquette"\nMiquette (born February 9, 1953) sings.')
    assert not hop.is_stated_in(dated, is_id_known=True) and hop.is_stated_in(dated, is_id_known=False)
    assert hop.is_stated_in(Passage("7", "anything"), is_id_known=True)


def test_an_analysis_says_what_is_known_and_what_is_next() -> None:
    question = Question("q", "Who died first?", ("Ann",), {})
    found = (Hop("When did Ann die?", "1901"), Hop("When did Bob die?", "1902"))
    first, second, last = (analysis(question, found, number) for number in range(3))
    assert "When did Ann die?" in first and "1901" not in first
    assert found[0].fact in second and second.endswith("When did Bob die?")
    assert f"{found[0].fact} {found[1].fact}" in last and last.endswith("Ann.")  # a comparison
    chain = Question("q", "When did Bob die?", ("1902",), {})
    assert "1901" not in analysis(chain, found, 2)
    texts = {analysis(Question(str(i), "?", ("1902",), {}), found, 0) for i in range(20)}
    assert len(texts) == 3
    for i in range(20):  # in whatever wording, what has been found comes before what follows from it
        known, settled = (analysis(Question(str(i), "When did Bob die?", ("1902",), {}), found, n) for n in (1, 2))
        assert known.startswith(found[0].fact) and settled.startswith(found[1].fact)

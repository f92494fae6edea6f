"""Gold decompositions: the forms of the data sets, and what each asks, says and searches."""

from __future__ import annotations

from typing import Any

import pytest

from r3rag_jax.coldstart.decomposition import Hop, hops_of
from r3rag_jax.coldstart.gold import analysis, decomposition_fault
from r3rag_jax.types import Passage, Question


def hops(**metadata: Any) -> tuple[Hop, ...]:
    return hops_of(Question("q", "Who?", ("x",), metadata))


def test_sub_questions_with_their_passages() -> None:
    [hop] = hops(decomposition=[{"sub_question": "Who wrote Das Kapital?", "answer": "Karl Marx", "passage_id": 12}])
    assert hop == Hop(
        "Who wrote Das Kapital?", 'The answer to "Who wrote Das Kapital?" is Karl Marx.', "Karl Marx",
        ("Who wrote Das Kapital?", "wrote Das Kapital"), "12",
    )  # fmt: skip


def test_references_and_relations_as_in_musique() -> None:
    rows = [
        {"id": 460946, "question": "Green >> performer", "answer": "Steve Hillage", "paragraph_support_idx": 10},
        {"id": 294723, "question": "#1 >> spouse", "answer": "Miquette Giraudy", "paragraph_support_idx": 5},
        {"id": 1, "question": "when was #2 born and did she know #1", "answer": "9 February 1953"},
    ]
    first, second, third = hops(question_decomposition=rows)
    assert first.queries == ("What is the performer of Green?", "Green performer", "Green")
    assert second.ask == "What is the spouse of Steve Hillage?"
    assert second.fact == "The spouse of Steve Hillage is Miquette Giraudy."
    assert third.queries == (
        "when was Miquette Giraudy born and did she know Steve Hillage?",
        "Miquette Giraudy born she know Steve Hillage",
    )
    assert {hop.passage_id for hop in (first, second, third)} == {None}


def test_triples_as_in_2wiki_and_hops_of_the_encyclopedia() -> None:
    [triple] = hops(evidences=[["Das Kapital", "author", "Karl Marx"]])
    [hop] = hops(decomposition=[{"entity": "X", "relation": "author", "answer": "Y", "passage_id": "3"}])
    assert triple.fact == "The author of Das Kapital is Karl Marx." and triple.passage_id is None
    assert (hop.ask, hop.passage_id) == ("What is the author of X?", "3")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "metadata must hold decomposition, question_decomposition or evidences; got []"),
        ({"evidences": [["a", "b"]]}, "hop 1: expected [subject, relation, object], three texts"),
        ({"evidences": ["a"]}, "hop 1: expected an object or [subject, relation, object]"),
        ({"decomposition": [{"sub_question": "Who?"}]}, "metadata.decomposition, hop 1: expected a field 'answer'"),
        ({"question_decomposition": [{"question": "#1 >> x", "answer": "y"}]}, "#1 must stand for one of the 0 hops"),
        ({"decomposition": "a"}, "decomposition must be a list"),
    ],
)
def test_faults_are_named(metadata: dict[str, Any], words: str) -> None:
    fault = decomposition_fault(Question("q", "Who?", ("x",), metadata))
    assert fault is not None and words in fault


def test_evidence_is_the_named_passage_or_one_with_the_answer() -> None:
    hop = Hop("?", ".", "9 February 1953", ("?",), "7")
    dated = Passage("8", '"Miquette"\nMiquette (born February 9, 1953) sings.')
    assert not hop.is_stated_in(dated, is_id_known=True) and hop.is_stated_in(dated, is_id_known=False)
    assert hop.is_stated_in(Passage("7", "anything"), is_id_known=True)


def test_an_analysis_says_what_is_known_and_what_is_next() -> None:
    question = Question("q", "Who died first?", ("Ann",), {})
    found = hops(evidences=[["Ann", "death", "1901"], ["Bob", "death", "1902"]])
    first, second, last = (analysis(question, found, number) for number in range(3))
    assert "What is the death of Ann?" in first and "1901" not in first
    assert "The death of Ann is 1901." in second and second.endswith("What is the death of Bob?")
    assert "The death of Ann is 1901. The death of Bob is 1902." in last and last.endswith("Ann.")  # a comparison
    chain = Question("q", "When did Bob die?", ("1902",), {})
    assert "1901" not in analysis(chain, found, 2)
    texts = {analysis(Question(str(i), "?", ("1902",), {}), found, 0) for i in range(20)}
    assert len(texts) == 3

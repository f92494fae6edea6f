"""Gold decompositions of MuSiQue, 2WikiMultiHopQA and wikihop become one shape."""

import json

import pytest

from r3rag_jax.data.decomposition import Hop, decomposition_of, from_steps, from_triples, relation_question
from r3rag_jax.data.fields import FieldError
from r3rag_jax.data.questions import read_questions
from r3rag_jax.data.wikihop import FILES
from r3rag_jax.types import Question


def question(decomposition: object) -> Question:
    return Question("q", "Who?", ("x",), {"decomposition": json.loads(json.dumps(decomposition))})


def test_steps_name_the_answers_of_earlier_ones() -> None:
    steps = [
        {"id": 1, "question": "Green >> performer", "answer": "Steve Hillage", "paragraph_support_idx": 10},
        {"id": 2, "question": "Who was married to #1 in #2, or #9?", "answer": "M", "paragraph_support_idx": 5},
        {"id": 3, "question": "#2 >> nickname", "answer": "Bambaloni", "paragraph_support_idx": None},
    ]  # fmt: skip
    paragraphs = [{"idx": 5, "title": "Miquette Giraudy"}, {"idx": 10, "title": "Green (album)"}]
    found = from_steps(steps, paragraphs)
    assert found == [
        {"sub_question": "Who performed Green?", "answer": "Steve Hillage", "title": "Green (album)"},
        {
            "sub_question": "Who was married to Steve Hillage in #2, or #9?",
            "answer": "M",
            "title": "Miquette Giraudy",
        },
        {"sub_question": "What is the nickname of M?", "answer": "Bambaloni"},
    ]
    assert decomposition_of(question(found))[0] == Hop("Who performed Green?", "Steve Hillage", "Green (album)")


def test_steps_of_flashrag_hold_their_paragraphs() -> None:
    steps = [{"question": "Who?", "answer": "x", "support_paragraph": {"title": "T", "paragraph_text": "…"}}]
    assert from_steps(steps, []) == [{"sub_question": "Who?", "answer": "x", "title": "T"}]


def test_triples_find_the_articles_of_their_subjects() -> None:
    triples = [
        ["Polish-Russian War", "director", "Xawery Żuławski"],
        ["Xawery Żuławski", "mother", "Małgorzata Braunek"],
    ]
    assert from_triples(triples, ["Xawery Żuławski", "Polish-Russian War (film)"]) == [
        {
            "sub_question": "Who directed Polish-Russian War?",
            "answer": "Xawery Żuławski",
            "title": "Polish-Russian War (film)",
        },
        {
            "sub_question": "Who was the mother of Xawery Żuławski?",
            "answer": "Małgorzata Braunek",
            "title": "Xawery Żuławski",
        },
    ]
    assert from_triples([["A", "shoe size", "9"]], ["B"]) == [
        {"sub_question": "What is the shoe size of A?", "answer": "9"}
    ]


def test_a_subject_with_braces_is_text() -> None:
    assert relation_question("{} (band)", "record label") == "Which record label released {} (band)?"
    assert relation_question("A {0}", "shoe {size}") == "What is the shoe {size} of A {0}?"


def test_decompositions_with_passages_of_the_corpus() -> None:
    row = {"sub_question": "Who?", "answer": "x", "passage_id": 7}
    assert decomposition_of(question([row])) == (Hop("Who?", "x", None, "7"),)
    assert decomposition_of(Question("q", "Who?", ("x",))) == decomposition_of(question(None)) == ()


@pytest.mark.parametrize(
    ("decomposition", "message"),
    [
        ("Who?", 'decomposition must be a list; got "Who?"'),
        (["Who?"], 'metadata.decomposition must be a list of objects; got "Who?"'),
        ([{"sub_question": "Who?"}], "metadata.decomposition, hop 1: expected a field 'answer'"),
        ([{"sub_question": "Who?", "answer": "x", "passage_id": 1.5}], "hop 1: passage_id must be a text; got 1.5"),
    ],
)
def test_another_shape_is_refused(decomposition: object, message: str) -> None:
    with pytest.raises(FieldError) as error:
        decomposition_of(question(decomposition))
    assert message in str(error.value)


def test_wikihop_has_decompositions() -> None:
    found = [decomposition_of(question) for question in read_questions(FILES / "dev.jsonl.xz")]
    assert len(found) == 541 and all(found)
    assert found[1] == (
        Hop("In which country is Galicia?", "Spain", None, "3379"),
        Hop("What is the capital of Spain?", "Madrid", None, "8474"),
    )

"""Questions and passages in FlashRAG's layout: what is read, and that every fault names its file and line."""

from pathlib import Path

import pytest
from rows import QUESTION, write

from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.questions import iterate_passages, question_to_dict, read_passages, read_questions
from r3rag_jax.errors import UserError
from r3rag_jax.types import Question


def test_questions(tmp_path: Path) -> None:
    metadata = {"type": "bridge", "supporting_ids": ["1", "2"]}
    full = {"id": 7, "question": "Qué?", "golden_answers": ["a", "b"], "metadata": metadata}
    first, second = read_questions(write(tmp_path, full, "", QUESTION))
    assert first == Question("7", "Qué?", ("a", "b"), metadata)
    assert first.supporting_ids == ("1", "2")
    assert second == Question("q0", "Who wrote Ulysses?", ("James Joyce",), {})


def test_metadata_that_is_null_is_metadata_that_is_missing(tmp_path: Path) -> None:
    rows = [
        {"metadata": {"supporting_ids": None, "type": None, "unseen": None, "level": None}},
        {"metadata": {"supporting_ids": [], "type": "", "unseen": False}},
        {"metadata": None},
        {"metadata": {"supporting_ids": [7, "p15"]}},
    ]
    found = read_questions(write(tmp_path, *[QUESTION | {"id": i} | row for i, row in enumerate(rows)]))
    assert [dict(question.metadata) for question in found] == [
        {"level": None},
        {"supporting_ids": [], "unseen": False},
        {},
        {"supporting_ids": [7, "p15"]},
    ]
    assert [question.supporting_ids for question in found] == [(), (), (), ("7", "p15")]


def test_supporting_ids_given_as_text_are_not_split_into_letters() -> None:
    with pytest.raises(TypeError, match="supporting_ids must be a list of ids; got 'p15'"):
        _ = Question("q", "Who?", ("x",), {"supporting_ids": "p15"}).supporting_ids


def test_passages_in_both_layouts(tmp_path: Path) -> None:
    rows = [
        {"id": "0", "contents": '"Darwin"\nA naturalist.'},
        {"id": "1", "title": "Darwin", "text": "A naturalist."},
    ]
    first, second = read_passages(write(tmp_path, *rows))
    assert first.contents == second.contents == '"Darwin"\nA naturalist.'
    assert (second.title, second.text) == ("Darwin", "A naturalist.")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "expected one JSON object per line"),
        ("[1]", "expected a JSON object; got a list"),
        ({"id": "q1", "golden_answers": ["a"]}, "expected a field 'question'"),
        (QUESTION | {"id": "q1", "question": 3}, "question must be a text; got 3"),
        (QUESTION | {"id": "q1", "question": " "}, "question must not be blank"),
        (QUESTION | {"id": None}, "id must be a text; got null"),
        (QUESTION | {"id": 1.5}, "id must be a text; got 1.5"),
        (QUESTION | {"id": "q1", "golden_answers": []}, "golden_answers must be one or more texts"),
        (QUESTION | {"id": "q1", "metadata": [1]}, "metadata must be an object; got [1]"),
        (QUESTION | {"id": True}, "id must be a text; got true"),
        (
            QUESTION | {"id": "q1", "metadata": {"supporting_ids": 15}},
            "metadata.supporting_ids must be a list of ids; got 15",
        ),
        (
            QUESTION | {"id": "q1", "metadata": {"supporting_ids": "p15"}},
            'metadata.supporting_ids must be a list of ids; got "p15"',
        ),
        (
            QUESTION | {"id": "q1", "metadata": {"supporting_ids": {"1": 2}}},
            "metadata.supporting_ids must be a list of ids; got {",
        ),
        (
            QUESTION | {"id": "q1", "metadata": {"supporting_ids": ["1", None]}},
            'metadata.supporting_ids must be a list of ids; got ["1", null]',
        ),
        (
            QUESTION | {"id": "q1", "metadata": {"supporting_ids": [True]}},
            "metadata.supporting_ids must be a list of ids; got [true]",
        ),
        (QUESTION | {"id": "q1", "metadata": {"type": 3}}, "metadata.type must be a text; got 3"),
        (QUESTION | {"id": "q1", "metadata": {"type": ["bridge"]}}, 'metadata.type must be a text; got ["bridge"]'),
        (QUESTION | {"id": "q1", "metadata": {"unseen": "no"}}, 'metadata.unseen must be true or false; got "no"'),
        (QUESTION | {"id": "q1", "metadata": {"unseen": 0}}, "metadata.unseen must be true or false; got 0"),
        (QUESTION, "ids must be unique; 'q0' is also on line 1"),
        (QUESTION | {"id": "\ud800"}, "expected Unicode text; got a lone surrogate escape"),
    ],
)
def test_fault_of_a_question_names_its_line(tmp_path: Path, line: object, expected: str) -> None:
    path = write(tmp_path, QUESTION, line)
    with pytest.raises(UserError) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}:2: {expected}")
    assert "\n" not in str(error.value)


def test_passages_one_at_a_time_are_those_of_the_list(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": "0", "contents": "a"}, {"id": 1, "contents": "b"}, "{")
    passages = iterate_passages(path)
    assert [next(passages).id, next(passages).id] == ["0", "1"]
    with pytest.raises(UserError, match=r"rows\.jsonl:3: expected one JSON object"):
        next(passages)


def test_written_questions_are_read_back(tmp_path: Path) -> None:
    questions = [Question(f"q{i}", "¿?\u2028", ("ñ",), {"hops": i}) for i in range(3)]
    path = tmp_path / "questions.jsonl"
    write_jsonl(path, map(question_to_dict, questions))
    assert read_questions(path) == questions

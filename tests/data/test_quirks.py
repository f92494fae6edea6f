"""Quirks of real files, a test each: what is read of them, or the message that names file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from r3rag_jax.data.questions import read_passages, read_questions
from r3rag_jax.data.records import OnError
from r3rag_jax.data.trajectories import read_trajectories
from r3rag_jax.errors import UserError
from r3rag_jax.types import Passage

Q = {"id": "q0", "question": "Who wrote Emma?", "golden_answers": ["Jane Austen"], "metadata": {"type": "bridge"}}
ODD = "Who\u2028wrote\x85it?"  # line ends to Python's str.splitlines, and to no JSON
P = {"id": "p0", "contents": '"Emma"\nA novel.'}


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "file.jsonl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(lines(Q | {"golden_answers": "Jane Austen"}), {}, id="a text where a list is due"),
        pytest.param(lines(Q | {"id": 7}), {"id": "7"}, id="a whole number for an id"),
        pytest.param(lines(Q | {"metadata": None}), {"metadata": {}}, id="null metadata"),
        pytest.param(lines(Q | {"metadata": {"type": None}}), {"metadata": {}}, id="null in metadata"),
        pytest.param(b"\xef\xbb\xbf" + lines(Q), {}, id="a byte order mark"),
        pytest.param(lines(Q).replace(b"\n", b"\r\n"), {}, id="CRLF"),
        pytest.param(lines(Q | {"question": ODD}), {"question": ODD}, id="U+2028"),
        pytest.param(b"\n \n" + lines(Q) + b"\n", {}, id="blank lines"),
        pytest.param(lines(Q).rstrip(b"\n"), {}, id="no line end at the end"),
        pytest.param(lines(Q | {"golden_answers": [1815, 2.0]}), {"golden_answers": ("1815", "2")}, id="numbers"),
    ],
)  # fmt: skip
def test_quirks_of_questions_that_are_read(tmp_path: Path, data: bytes, expected: dict[str, Any]) -> None:
    [question] = read_questions(written(tmp_path, data))
    usual = {
        "id": "q0",
        "question": "Who wrote Emma?",
        "golden_answers": ("Jane Austen",),
        "metadata": {"type": "bridge"},
    }
    assert {name: getattr(question, name) for name in usual} == usual | expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        pytest.param(Q, "ids must be unique; 'q0' is also on line 1", id="repeated id"),
        pytest.param(Q | {"id": "q1", "golden_answers": []}, "golden_answers must be one or more", id="no answers"),
        pytest.param(Q | {"id": "q1", "golden_answers": [""]}, "golden_answers must be one or more", id="blank answer"),
        pytest.param(Q | {"id": "q1", "question": " \n"}, "question must not be blank", id="blank question"),
        pytest.param({"id": "q1", "question": "Who?"}, "expected a field 'golden_answers'", id="no field of answers"),
        pytest.param(Q | {"id": "q1", "metadata": {"supporting_ids": "p0"}}, "metadata.supporting_ids", id="lone id"),
        pytest.param(["q1"], "expected a JSON object; got a list", id="no object"),
    ],
)  # fmt: skip
def test_quirks_of_questions_stop_or_are_left_out_and_counted(tmp_path: Path, row: object, message: str) -> None:
    path = written(tmp_path, lines(Q, row, Q | {"id": "q2"}))
    with pytest.raises(UserError) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}:2: {message}")
    said: list[str] = []
    skip = OnError("skip", said.append)
    assert [question.id for question in read_questions(path, skip)] == ["q0", "q2"]
    assert f"{path}: left out 1 of 3 records (data.on_error=skip):\n  {path}:2: {message}" in said[0]
    assert skip.num_left_out == {str(path): 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        pytest.param({"id": "p1", "contents": " "}, "contents must not be blank", id="empty passage"),
        pytest.param({"id": "p1", "title": "Emma", "text": ""}, "text must not be blank", id="a title alone"),
        pytest.param({"id": "p1", "contents": None}, "contents must be a text; got null", id="null"),
        pytest.param(P, "ids must be unique; 'p0' is also on line 1", id="repeated id"),
    ],
)
def test_quirks_of_passages_stop_or_are_left_out(tmp_path: Path, row: object, message: str) -> None:
    path = written(tmp_path, lines(P, row, P | {"id": 2}))
    with pytest.raises(UserError) as error:
        read_passages(path)
    assert str(error.value).startswith(f"{path}:2: {message}")
    assert [passage.id for passage in read_passages(path, OnError("skip", lambda text: None))] == ["p0", "2"]


def test_quirks_of_trajectories(tmp_path: Path) -> None:
    end = {"analysis": "Known.", "answer": "Jane Austen"}
    search = {"analysis": "I look.", "query": "Who?", "passage_ids": [0], "retrieved_ids": None, "passages": None}
    good = Q | {"golden_answers": "Jane Austen", "steps": [search, end]}
    bad = [
        Q | {"id": "q1", "steps": []},
        Q | {"id": "q2", "steps": [search | {"passage_ids": ["9"]}, end]},
        Q | {"id": "q3", "steps": [search | {"passage_ids": "0"}, end]},
        good,
    ]
    path = written(tmp_path, lines(good, *bad))
    said: list[str] = []
    [found] = read_trajectories(path, {"0": Passage("0", "a")}, 1, OnError("skip", said.append))
    assert found.retrieved_ids == ("0",)
    rules = [line.split(": ", 1)[1] for line in said[0].splitlines()[1:]]
    assert rules == [
        "steps must end with the only one that holds an answer",
        "step 1: passage ids must be in the corpus of 1 passages; got '9'",
        'step 1: passage_ids must be a list; got "0"',
        "ids must be unique; 'q0' is also on line 1",
    ]


@pytest.mark.parametrize(
    "paragraphs",
    [[1], [{"idx": {}, "title": "T"}], [{"idx": 0, "title": ["T"]}], [{"title": "T"}], [[]]],
    ids=["a number", "an index that is an object", "a title that is a list", "no index", "a list"],
)
def test_paragraphs_of_another_shape_give_no_title(tmp_path: Path, paragraphs: list[Any]) -> None:
    steps = [{"question": "Who?", "answer": "He", "paragraph_support_idx": 0}]
    steps += [{"question": "What?", "answer": "It", "paragraph_support_idx": []}]
    steps += [{"question": "When?", "answer": "1815", "support_paragraph": {"title": ["T"]}}]
    row = Q | {"metadata": {"question_decomposition": steps, "paragraphs": paragraphs}}
    [question] = read_questions(written(tmp_path, lines(row)))
    assert question.metadata["supporting_titles"] == []
    assert [hop["answer"] for hop in question.metadata["decomposition"]] == ["He", "It", "1815"]


@pytest.mark.parametrize("first", [b"a,b\rc\n", b'{"id": "x' + b"x" * 200_000 + b'"}\n'], ids=["a return", "long"])
def test_a_first_line_that_csv_cannot_read_is_a_record(tmp_path: Path, first: bytes) -> None:
    """csv.Error: a carriage return in a field, or a field of more than 128 KiB, ended the reading of any file."""
    path = written(tmp_path, first + lines(Q))
    with pytest.raises(UserError, match=rf"^{path}:1: expected"):
        read_questions(path)
    assert [question.id for question in read_questions(path, OnError("skip", lambda text: None))] == ["q0"]


def test_a_record_nested_deeper_than_any_data_set_is_a_fault(tmp_path: Path) -> None:
    deep = Q | {"id": "q1", "metadata": {"a": "?"}}
    text = lines(Q, deep).replace(b'"?"', b"[" * 200_000)
    with pytest.raises(UserError, match=r":2: expected one JSON object per line; objects and arrays may be nested"):
        read_questions(written(tmp_path, text))


def test_a_huge_id_fills_no_screen(tmp_path: Path) -> None:
    row = Q | {"id": "9" * 3_000_000}
    said: list[str] = []
    with pytest.raises(UserError) as error:
        read_questions(written(tmp_path, lines(row, row)))
    assert len(str(error.value)) < 1000 and str(error.value).endswith("is also on line 1")
    read_questions(written(tmp_path, lines(row, row)), OnError("skip", said.append))
    assert len(said[0]) < 1000

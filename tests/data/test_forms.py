"""Files as others hand them out: forms of a file, names and types of fields are read, or refused with the remedy."""

import bz2
import datetime
import gzip
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from rows import QUESTION, write

from r3rag_jax.data.forms import read_objects
from r3rag_jax.data.questions import iterate_passages, read_passages, read_questions
from r3rag_jax.data.records import OnError
from r3rag_jax.data.trajectories import read_trajectories
from r3rag_jax.errors import UserError
from r3rag_jax.types import Passage

ROWS = [QUESTION | {"id": f"q{i}", "metadata": {"type": "bridge", "supporting_ids": ["1"]}} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "any_name"
    path.write_bytes(data)
    return path


def parquet(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + LINES,
        LINES.replace(b"\n", b"\r\n"),
        LINES + b"\xef\xbb\xbf",
        gzip.compress(LINES, mtime=0),
        gzip.compress(LINES[:200], mtime=0) + gzip.compress(LINES[200:], mtime=0),
        bz2.compress(LINES),
        lzma.compress(LINES),
        json.dumps(ROWS).encode(),
        b"\n  " + json.dumps(ROWS, indent=1).encode() + b"\n\n",
        b"\xef\xbb\xbf" + json.dumps(ROWS, separators=(",", ":")).encode(),
        gzip.compress(json.dumps(ROWS, indent=2).encode(), mtime=0),
    ],
)
def test_the_same_questions_in_every_form(tmp_path: Path, data: bytes) -> None:
    assert read_questions(written(tmp_path, data)) == read_questions(write(tmp_path, *ROWS))


def test_parquet_holds_the_same_questions(tmp_path: Path) -> None:
    found = read_questions(parquet(tmp_path, ROWS))
    assert found == read_questions(write(tmp_path, *ROWS)) and found.lines == [1, 2, 3]


def test_what_a_table_fills_with_null_is_missing(tmp_path: Path) -> None:
    steps = [
        {"analysis": "I need it.", "query": "Who?", "passages": [{"id": "7", "contents": "James Joyce"}]},
        {"analysis": "I know.", "answer": "James Joyce"},
    ]
    rows = [QUESTION | {"metadata": {"type": "x"}}, QUESTION | {"id": "q1", "metadata": {"unseen": True}}]
    found = read_trajectories(parquet(tmp_path, [row | {"steps": steps} for row in rows]), {}, 1)
    assert [step.query for step in found[0].steps] == ["Who?", None]
    assert [dict(trajectory.question.metadata) for trajectory in found] == [{"type": "x"}, {"unseen": True}]


def test_values_that_json_lacks_become_text(tmp_path: Path) -> None:
    row = QUESTION | {"question": b"Qu\xc3\xa9?", "metadata": {"when": datetime.date(2024, 2, 29), "spans": [(1, 2)]}}
    [question] = read_questions(parquet(tmp_path, [row]))
    assert question.question == "Qué?"
    assert json.loads(json.dumps(question.metadata)) == {"when": "2024-02-29", "spans": [[1, 2]]}
    with pytest.raises(UserError, match=r"rows\.parquet:1: expected UTF-8; got byte 0xe9"):
        read_questions(parquet(tmp_path, [row | {"question": b"Qu\xe9?"}]))


def test_a_corpus_is_read_in_every_form_too(tmp_path: Path) -> None:
    passages = [{"id": 1, "contents": "a"}, {"id": "2", "contents": "b"}]
    assert [
        p.id for p in iterate_passages(written(tmp_path, gzip.compress(json.dumps(passages).encode(), mtime=0)))
    ] == [
        "1",
        "2",
    ]
    assert [p.id for p in iterate_passages(parquet(tmp_path, [{"id": 1, "contents": "a"}]))] == ["1"]


def test_passages_of_dpr_and_of_zstd(tmp_path: Path) -> None:
    text = 'id\ttext\ttitle\n1\t"A ""red"" door,\nand a lamp"\tDoors\n\n2\tnew\t""\n'
    expected = [Passage("1", '"Doors"\nA "red" door,\nand a lamp'), Passage("2", "new")]
    for data in (text.encode(), text.replace("\n", "\r\n").encode("utf-8-sig"), gzip.compress(text.encode(), mtime=0)):
        found = [Passage(p.id, p.contents.replace("\r\n", "\n")) for p in iterate_passages(written(tmp_path, data))]
        assert found == expected
    lines = [(number, row) for number, row in read_objects(written(tmp_path, text.encode()))]
    assert [number for number, _ in lines] == [2, 5]
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.zst"), "zstd") as file:
        file.write(LINES)
    assert list(read_objects(tmp_path / "a.zst")) == list(read_objects(written(tmp_path, LINES)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("é\n".encode("utf-16"), "any_name: expected JSON in UTF-8, or Parquet; got UTF-16: save it as UTF-8"),
        (b"\x28\xb5\x2f\xfd....", "any_name: expected a readable file of records; ZSTD decompress"),
        (b"id\ttext\ttitle\n1\ta\n", "any_name:2: expected 3 fields, id, text, title; got 2"),
        (b'id\ttext\n1\t"a"b\n', "any_name:2: expected the fields id, text; "),
        (b"id\ttext\n1\t\xff\n", "any_name:2: expected UTF-8; got byte 0xff"),
        (b"PK\x03\x04....", "any_name: expected JSON in UTF-8, or Parquet; got a zip archive: unzip it"),
        (gzip.compress(LINES, mtime=0)[:-20], "any_name: expected a whole compressed file; "),
        (gzip.compress(LINES, mtime=0)[:40] + b"\xff" * 40, "any_name: expected a whole compressed file; "),
        (b"\x1f\x8b\x01 no method of gzip's", "any_name: expected a whole compressed file; "),
        (b"PAR1 and no more", "any_name: expected a whole Parquet file; "),
        (b"[]", "any_name: expected at least one record"),
        (b'[\n{"id": 1},\n3]', "any_name:2: expected a field"),
        (json.dumps([ROWS[0], 3], indent=0).encode(), "any_name:15: expected a JSON object; got a whole number"),
        (b"[" + LINES[:-1] + b"]", "any_name:2: expected a JSON array of objects; expecting ',' or ']'"),
        (json.dumps(ROWS).encode()[:-1], "any_name:1: expected a JSON array of objects; expecting ',' or ']'"),
        (json.dumps(ROWS[:1], indent=0).encode()[:-5], "any_name:13: expected a JSON array of objects; "),
        (json.dumps(ROWS[:1]).encode() + b"\n[]", "any_name:1: expected one JSON array; something follows it"),
        (b'[{"id": "\\ud800"}]', "any_name:1: expected Unicode text; got a lone surrogate escape"),
        (b'[{"id":\n"\xff"}]', "any_name:2: expected UTF-8; got byte 0xff"),
        (b"question,answer\nWho?,x\n", "any_name:2: expected a record with an id, or of a known data set; got the f"),
        (b"question,question\nWho?,x\n", "any_name:1: expected one JSON object per line; Expecting value at column 1"),
        (b"question,answer\nWho?\n", "any_name:2: expected 2 fields, question, answer; got 1"),
        (b'{\n"id": "q0"}\n', "any_name:1: expected one JSON object per line; Expecting property name"),
        (b'{"Data": [\n{"id": 1},\n 3 4]}', "any_name:2: expected a field 'question'"),
        (b'{"Data": [\n 3 4]}', "any_name:2: expected a JSON object; got a whole number"),
    ],
)
def test_what_is_in_no_form_is_refused_with_its_place(tmp_path: Path, data: bytes, expected: str) -> None:
    with pytest.raises(UserError) as error:
        read_questions(written(tmp_path, data))
    assert str(error.value).startswith(f"{tmp_path}/{expected}")


def test_elements_of_an_array_are_left_out_by_themselves(tmp_path: Path) -> None:
    said: list[str] = []
    found = read_questions(written(tmp_path, json.dumps([ROWS[0], 3, ROWS[1]]).encode()), OnError("skip", said.append))
    assert [question.id for question in found] == ["q0", "q1"] and "left out 1 of 3" in said[0]


def test_parquet_without_its_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path, ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a Parquet file needs the package pyarrow: pip install pyarrow"):
        read_questions(path)


# ----------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"golden_answers": "1986"}, ("1986",)),
        ({"golden_answers": [1986, 3.5, 1986.0]}, ("1986", "3.5", "1986")),
        ({"golden_answers": True}, ("yes", "true")),
        ({"golden_answers": [False]}, ("no", "false")),
        ({"answer": "x"}, ("x",)),
        ({"answers": ["x", "y"]}, ("x", "y")),
        ({"golden_answers": ["x"], "answer": "other"}, ("x",)),
        ({"golden_answers": None, "answer": "x"}, ("x",)),
        ({"answer": "x", "answer_aliases": ["y", "z"]}, ("x", "y", "z")),
    ],
)
def test_answers_as_data_sets_write_them(tmp_path: Path, fields: dict[str, Any], expected: tuple[str, ...]) -> None:
    [question] = read_questions(write(tmp_path, {"_id": 7, "question": "Who?", "metadata": []} | fields))
    assert question.golden_answers == expected
    assert question.id == "7" and question.metadata == {}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "expected a field 'golden_answers' (or 'answers', 'answer'); got the fields ['id', 'question']"),
        ({"golden_answers": []}, "golden_answers must be one or more texts, numbers or truth values; got []"),
        ({"golden_answers": ["x", " "]}, 'golden_answers must be one or more texts, numbers or truth values; got ["x"'),
        ({"golden_answers": None}, "golden_answers must be one or more texts, numbers or truth values; got null"),
        ({"answer": {"value": "x"}}, "answer must be one or more texts, numbers or truth values; got {"),
        ({"answers": [["x"]]}, "answers must be one or more texts, numbers or truth values; got [["),
        ({"answer": float("nan")}, "answer must be one or more texts, numbers or truth values; got NaN"),
        ({"answer": "x", "answer_aliases": [3]}, "answer_aliases must be a list of texts; got [3]"),
        ({"answer": "x", "metadata": ["a"]}, 'metadata must be an object; got ["a"]'),
        ({"answer": "x", "id": None, "_id": None}, "id must be a text; got null"),
    ],
)
def test_answers_that_are_none_are_refused(tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    path = write(tmp_path, {"id": "q", "question": "Who?"} | fields)
    with pytest.raises(UserError) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}:1: {expected}")


def test_passages_of_other_data_sets(tmp_path: Path) -> None:
    rows = [{"_id": "a", "title": "T", "text": "x"}, {"_id": "b", "title": "", "text": "y"}, {"id": 3, "text": "z"}]
    found = read_passages(write(tmp_path, *rows))
    assert [(p.id, p.contents) for p in found] == [("a", '"T"\nx'), ("b", "y"), ("3", "z")]
    with pytest.raises(UserError, match=r"expected a field 'contents' \(or 'text'\); got the fields \['id'\]"):
        read_passages(write(tmp_path, {"id": "1"}))

"""`data.on_error`: a record that breaks a rule ends the reading with its place, or is left out and reported."""

from pathlib import Path

import pytest
from rows import QUESTION, write

from r3rag_jax.data.questions import iterate_passages, read_questions
from r3rag_jax.data.records import OnError, Records
from r3rag_jax.data.trajectories import read_trajectories
from r3rag_jax.errors import UserError

NEXT = QUESTION | {"id": "q1"}


def collector() -> tuple[list[str], OnError]:
    said: list[str] = []
    return said, OnError("skip", said.append)


def test_skipping_leaves_out_what_cannot_be_read_and_says_where(tmp_path: Path) -> None:
    path = write(tmp_path, QUESTION, "{", "", NEXT | {"question": 3}, NEXT, NEXT, "[1]")
    said, skip = collector()
    found = read_questions(path, skip)
    assert [question.id for question in found] == ["q0", "q1"]
    assert found.lines == [1, 5] and found.place(1) == f"{path}:5"
    [text] = said
    head, *faults = text.splitlines()
    assert head == f"{path}: left out 4 of 6 records (data.on_error=skip):"
    assert [fault.split(": ")[0].strip() for fault in faults] == [f"{path}:{line}" for line in (2, 4, 6, 7)]
    assert faults[1].endswith("question must be a text; got 3") and "also on line 5" in faults[2]


def test_only_the_first_few_are_named(tmp_path: Path) -> None:
    said, skip = collector()
    assert len(read_questions(write(tmp_path, QUESTION, *["{"] * 14), skip)) == 1
    assert said[0].splitlines()[-1].strip() == "and 4 more" and len(said[0].splitlines()) == 12


def test_a_file_without_a_fault_is_not_spoken_of(tmp_path: Path) -> None:
    said, skip = collector()
    assert read_questions(write(tmp_path, QUESTION, NEXT), skip) == read_questions(write(tmp_path, QUESTION, NEXT))
    assert said == []


def test_a_file_of_which_nothing_is_left_is_an_error_in_any_case(tmp_path: Path) -> None:
    said, skip = collector()
    with pytest.raises(UserError, match=r"data\.on_error=skip leaves none of 2 records; .*rows\.jsonl:1: expected one"):
        read_questions(write(tmp_path, "{", "{"), skip)
    with pytest.raises(UserError, match="the file holds none"):
        read_questions(write(tmp_path, ""), skip)
    with pytest.raises(UserError, match="No such file"):
        read_questions(tmp_path / "absent.jsonl", skip)
    assert said == []


def test_passages_one_at_a_time_are_reported_when_the_last_one_is_taken(tmp_path: Path) -> None:
    said, skip = collector()
    passages = iterate_passages(
        write(tmp_path, {"id": 0, "contents": "a"}, {"id": 1}, {"id": 2, "contents": "c"}), skip
    )
    assert next(passages).id == "0" and next(passages).id == "2" and said == []
    assert list(passages) == [] and len(said) == 1


def test_trajectories_are_left_out_too(tmp_path: Path) -> None:
    steps = [{"analysis": "I know.", "answer": "x"}]
    path = write(tmp_path, QUESTION | {"steps": []}, NEXT | {"steps": steps})
    said, skip = collector()
    assert read_trajectories(path, {}, 1, skip).lines == [2]
    assert "steps must end with the only one that holds an answer" in said[0]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: steps must end"):
        read_trajectories(path, {}, 1)


def test_a_later_check_names_the_records_places() -> None:
    records = Records("f.jsonl", [(1, "a"), (4, "bbb"), (5, "c"), (9, "dd")])
    said, skip = collector()

    def fault_of(text: str) -> str | None:
        return f"{text!r} is too long" if len(text) > 1 else None

    kept = skip.check(records, fault_of)
    assert kept == ["a", "c"] and kept.lines == [1, 5]
    assert said == [
        "f.jsonl: left out 2 of 4 records (data.on_error=skip):\n"
        "  f.jsonl:4: 'bbb' is too long\n  f.jsonl:9: 'dd' is too long"
    ]
    with pytest.raises(UserError, match=r"^f\.jsonl:4: 'bbb' is too long; f\.jsonl:9: 'dd' is too long; correct"):
        OnError("stop").check(records, fault_of)
    assert OnError("stop").check(kept, fault_of) == kept

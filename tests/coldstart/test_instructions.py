"""The released instruction format, in and out, against rows that are typed out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from r3rag_jax.coldstart.__main__ import main
from r3rag_jax.coldstart.instructions import export, read_instructions, rows_of
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.questions import passage_to_dict
from r3rag_jax.data.records import OnError
from r3rag_jax.data.trajectories import read_trajectories, trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

PASSAGES = (
    Passage("a", '"Charles Darwin"\nCharles Darwin was an English naturalist, born in Shrewsbury.\nHe died in Downe.'),
    Passage("b", '"Darwin (surname)"\nDarwin is an English surname.'),
    Passage("c", "Shrewsbury is a town in Shropshire, England."),
)
TRAJECTORY = Trajectory(
    Question("q", "Was the naturalist Darwin an American?", ("no",)),
    (
        Step("naming Darwin: where was he born?\nIn which nation?", query="Where was Darwin born? When?",
             passages=PASSAGES[:2]),
        Step("Shrewsbury is a town. I need its nation.", query="Shrewsbury location", passages=PASSAGES[2:]),
        Step("He was born in England.", answer="no"),
    ),
    Status.ANSWERED,
)  # fmt: skip
FIRST = (
    "Step 1:\nThe problem analysis: naming Darwin: where was he born?\nIn which nation?\n"
    "The retrieval query: Where was Darwin born? When?"
)
SECOND = (
    "Step 2:\nThe problem analysis: Shrewsbury is a town. I need its nation.\nThe retrieval query: Shrewsbury location"
)
THIRD = "Step 3:\nThe problem analysis: He was born in England.\nThe final answer: no"
PROMPT_1 = "The question: Was the naturalist Darwin an American?"
PROMPT_2 = (
    f'{PROMPT_1}\n{FIRST}\nThe retrieval documents: "Charles Darwin"\nCharles Darwin was an English naturalist, '
    'born in Shrewsbury.\nHe died in Downe.\n"Darwin (surname)"\nDarwin is an English surname.'
)
PROMPT_3 = f"{PROMPT_2}\n{SECOND}\nThe retrieval documents: Shrewsbury is a town in Shropshire, England."
ROWS = [
    {"instruction": prompt, "input": "", "output": output}
    for prompt, output in ((PROMPT_1, FIRST), (PROMPT_2, SECOND), (PROMPT_3, THIRD))
]


def write(path: Path, rows: object) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def corpus(tmp_path: Path, *passages: Passage) -> Path:
    path = tmp_path / "corpus.jsonl"
    others = [Passage("x", '"Charles Darwin"\nCharles Darwin was an English naturalist'), Passage("y", "Shrewsbury")]
    write_jsonl(path, map(passage_to_dict, [*others, *passages]))
    return path


def test_the_rows_of_a_trajectory() -> None:
    assert [*rows_of(TRAJECTORY)] == ROWS


def test_an_exported_file_is_one_array(tmp_path: Path) -> None:
    assert export([TRAJECTORY, TRAJECTORY], tmp_path / "out.json") == 6
    assert json.loads((tmp_path / "out.json").read_text("utf-8")) == ROWS * 2
    assert export([], tmp_path / "none.json") == 0 and json.loads((tmp_path / "none.json").read_text()) == []


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [2]])
def test_what_was_exported_is_imported_in_any_order(tmp_path: Path, order: list[int]) -> None:
    path = write(tmp_path / "rows.json", [ROWS[i] for i in order])
    [found] = read_instructions(path, corpus(tmp_path, *PASSAGES))
    assert found.steps == TRAJECTORY.steps and found.status is Status.ANSWERED
    assert (found.question.question, found.question.golden_answers) == (TRAJECTORY.question.question, ("no",))
    assert [*rows_of(found)] == ROWS


def test_without_a_corpus_titles_split_passages(tmp_path: Path) -> None:
    [found] = read_instructions(write(tmp_path / "rows.json", ROWS))
    assert [[p.contents for p in step.passages] for step in found.steps] == [
        [PASSAGES[0].contents, PASSAGES[1].contents], [PASSAGES[2].contents], [],
    ]  # fmt: skip
    assert all(p.id.startswith("text-") for step in found.steps for p in step.passages)
    assert [*rows_of(found)] == ROWS


def test_documents_that_the_corpus_lacks_are_counted(tmp_path: Path) -> None:
    said: list[str] = []
    path = write(tmp_path / "rows.json", ROWS)
    [found] = read_instructions(path, corpus(tmp_path, *PASSAGES[:2]), OnError("stop", said.append))
    assert [p.id[:5] for step in found.steps for p in step.passages] == ["a", "b", "text-"]
    assert said == [f"{path}: 1 of 2 lists of documents are not passages of {tmp_path / 'corpus.jsonl'}"]


def test_several_trajectories_of_a_question_and_rows_of_none(tmp_path: Path) -> None:
    said: list[str] = []
    other = {
        "instruction": PROMPT_1,
        "input": None,
        "output": "Step 1:\nThe problem analysis: I know.\nThe final answer: No",
    }
    lost = {"instruction": PROMPT_1, "output": FIRST.replace("In which nation?", "Where?")}
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [*ROWS, other, lost, other])
    found = read_instructions(path, on_error=OnError("stop", said.append))
    assert [(t.sample_index, t.answer, len(t.steps)) for t in found] == [(0, "no", 3), (1, "No", 1)]
    assert found[0].question.id == found[1].question.id
    assert said == [f"{path}: 1 of 6 rows belong to no answer: line 5"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"instruction": "Who?"}, ":2: instruction must begin with 'The question: '; got \"Who?\""),
        ({"output": "Step 3:\nhm"}, ":2: the output must hold a well-formed step 2"),
        ({"input": "x"}, ':2: input must be empty; got "x"'),
        (
            {"instruction": PROMPT_2.replace("The retrieval documents", "Found")},
            ":2: step 1 of the instruction must sh",
        ),
        (
            {"instruction": PROMPT_2.replace("The retrieval query", "The final answer")},
            ":2: only the last step may hold",
        ),
        ({"output": 3}, ":2: output must be a text; got 3"),
    ],
)
def test_a_malformed_row_is_named_and_may_be_left_out(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [ROWS[0], ROWS[1] | change, ROWS[2]])
    with pytest.raises(UserError) as caught:
        read_instructions(path)
    assert f"{path}{words}" in str(caught.value)
    said: list[str] = []
    assert len(read_instructions(path, on_error=OnError("skip", said.append))) == 1 and words in said[0]


def test_a_file_without_an_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a row whose output holds a final answer; got none in 2"):
        read_instructions(write(tmp_path / "rows.json", ROWS[:2]))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, passages = write(tmp_path / "rows.json", ROWS), corpus(tmp_path, *PASSAGES)
    mine, back = tmp_path / "mine.jsonl", tmp_path / "back.json"
    assert main(["import", str(path), str(mine), "--corpus", str(passages)]) == 0
    [found] = read_trajectories(mine, {}, 2)  # what a training reads
    assert found.steps == TRAJECTORY.steps
    assert main(["export", str(mine), str(back)]) == 0
    assert json.loads(back.read_text("utf-8")) == ROWS
    assert capsys.readouterr().out == f"{mine}: 1 trajectories\n{back}: 3 rows of 1 trajectories\n"
    row = trajectory_to_dict(TRAJECTORY)
    for step in row["steps"][:2]:
        step["retrieved_ids"] = [passage["id"] for passage in step.pop("passages")]
    write_jsonl(mine, [row])
    assert main(["export", str(mine), str(back), "--corpus", str(passages), "--top-k", "1"]) == 0
    assert "(surname)" not in back.read_text("utf-8")
    assert main(["import", str(passages), str(mine)]) == 2
    assert "corpus.jsonl:1: expected a field 'instruction'" in capsys.readouterr().err

"""Trajectories as JSONL: a teacher's and recorded ones, and that every fault names its file, line and step."""

import json
from pathlib import Path

import pytest
from rows import QUESTION, write

from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.trajectories import read_trajectories, trajectory_from_dict, trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

CORPUS = {i: Passage(i, f'"Title {i}"\nText {i}.') for i in "abcdef"}


def teacher(*retrievals: dict[str, object], **fields: object) -> dict[str, object]:
    steps = [{"analysis": "look up", "query": "who?"} | retrieval for retrieval in retrievals]
    return QUESTION | {"steps": [*steps, {"analysis": "known", "answer": "James Joyce"}]} | fields


def shown(path: Path, k: int = 2) -> list[list[str]]:
    (trajectory,) = read_trajectories(path, CORPUS, k)
    return [[passage.id for passage in step.passages] for step in trajectory.steps]


def test_teacher_trajectory(tmp_path: Path) -> None:
    (trajectory,) = read_trajectories(write(tmp_path, teacher({"retrieved_ids": ["a"]})), CORPUS, 2)
    assert trajectory == Trajectory(
        question=Question("q0", "Who wrote Ulysses?", ("James Joyce",), {}),
        steps=(
            Step("look up", query="who?", passages=(CORPUS["a"],)),
            Step("known", answer="James Joyce"),
        ),
        status=Status.ANSWERED,
    )


@pytest.mark.parametrize(
    ("retrieval", "expected"),
    [
        ({"retrieved_ids": ["a", "b", "c"]}, ["a", "b"]),
        ({"retrieved_ids": ["a", "b", "c"], "passage_ids": ["c"]}, ["a", "c"]),
        ({"retrieved_ids": ["a", "b", "c"], "passage_ids": ["b"]}, ["a", "b"]),
        ({"retrieved_ids": ["a", "b"], "passage_ids": ["f"]}, ["a", "f"]),
        ({"retrieved_ids": ["a", "a", "b"]}, ["a", "b"]),
        ({"passage_ids": ["c", "b", "a"]}, ["c", "b", "a"]),
        ({"retrieved_ids": []}, []),
    ],
)
def test_documents_are_the_best_ones_and_the_needed_ones(
    tmp_path: Path, retrieval: dict[str, object], expected: list[str]
) -> None:
    assert shown(write(tmp_path, teacher(retrieval))) == [expected, []]


def test_repeated_passages_are_dropped_and_the_next_ones_fill_up(tmp_path: Path) -> None:
    again = {"retrieved_ids": ["a", "b", "c", "d"], "passage_ids": ["a"]}
    path = write(tmp_path, teacher({"retrieved_ids": ["a", "c"]}, again, again))
    assert shown(path) == [["a", "c"], ["b", "d"], [], []]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            teacher({"retrieved_ids": ["x"]}),
            "step 1: passage ids must be in the corpus of 6 passag",
        ),
        (
            teacher({"retrieved_ids": ["a"]}, {}),
            "step 2: a query step must hold passages, retrieve",
        ),
        (teacher({"retrieved_ids": "a"}), 'step 1: retrieved_ids must be a list; got "a"'),
        (teacher({"passages": ["a"]}), "step 1: passages must be objects {id, contents}; got a te"),
        (teacher({"answer": "b"}), "step 1: a step must hold either a query or an answer"),
        (teacher({"analysis": 1, "passage_ids": ["a"]}), "step 1: analysis must be a text; got 1"),
        (teacher(steps=[]), "steps must end with the only one that holds an answer"),
        (teacher(steps=["look up"]), "step 1 must be an object; got a text"),
        (
            teacher(steps=[{"analysis": "x", "query": "y", "passage_ids": ["a"]}]),
            "steps must end with the only one that holds an answer",
        ),
        (teacher(steps=[{"analysis": "x", "answer": "y"}] * 2), "steps must end with the only one"),
    ],
)
def test_fault_of_a_trajectory_names_its_step(tmp_path: Path, row: dict[str, object], expected: str) -> None:
    path = write(tmp_path, row)
    with pytest.raises(UserError) as error:
        read_trajectories(path, CORPUS, 2)
    assert str(error.value).startswith(f"{path}:1: {expected}")


def test_several_trajectories_of_a_question(tmp_path: Path) -> None:
    rows = [teacher({"retrieved_ids": ["a"]}, sample_index=i) for i in (0, 1)]
    assert [t.sample_index for t in read_trajectories(write(tmp_path, *rows), CORPUS, 1)] == [
        0,
        1,
    ]
    with pytest.raises(UserError, match=r":2: ids must be unique"):
        read_trajectories(write(tmp_path, rows[0], rows[0]), CORPUS, 1)


def recorded() -> Trajectory:
    return Trajectory(
        question=Question("q0", "Who?", ("a",), {"hops": 2}),
        steps=(
            Step("look up", query="who?", passages=(CORPUS["b"], CORPUS["a"])),
            Step("known", answer="a"),
        ),
        status=Status.ANSWERED,
        sample_index=3,
    )


@pytest.mark.parametrize(
    "last",
    [
        (Step("known", answer="a"), Status.ANSWERED),
        (Step("again", query="who?"), Status.NO_ANSWER),
        (Step("mumble", is_well_formed=False), Status.FORMAT_ERROR),
    ],
)
def test_trajectory_survives_its_dict(last: tuple[Step, Status]) -> None:
    trajectory = Trajectory(recorded().question, (recorded().steps[0], last[0]), last[1], sample_index=3)
    row = json.loads(json.dumps(trajectory_to_dict(trajectory)))
    assert trajectory_from_dict(row) == trajectory


def test_recorded_trajectory_is_a_teachers_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rollouts.jsonl"
    write_jsonl(path, [trajectory_to_dict(recorded())])
    assert read_trajectories(path, {}, 2) == [recorded()]


def test_unknown_status() -> None:
    row = trajectory_to_dict(recorded()) | {"status": "DONE"}
    with pytest.raises(ValueError, match="status must be one of ANSWERED, NO_ANSWER, FORMAT_ERROR"):
        trajectory_from_dict(row)

"""Reading FlashRAG JSONL: what is read, and that every fault names its file and line."""

import json
from pathlib import Path

import pytest

from r3rag_jax.data import qa
from r3rag_jax.errors import UserError
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

CORPUS = {i: Passage(i, f'"Title {i}"\nText {i}.') for i in "abcdef"}
QUESTION = {"id": "q0", "question": "Who wrote Ulysses?", "golden_answers": ["James Joyce"]}


def write(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def teacher(*retrievals: dict[str, object], **fields: object) -> dict[str, object]:
    steps = [{"analysis": "look up", "query": "who?"} | retrieval for retrieval in retrievals]
    return QUESTION | {"steps": [*steps, {"analysis": "known", "answer": "James Joyce"}]} | fields


def shown(path: Path, k: int = 2) -> list[list[str]]:
    (trajectory,) = qa.read_trajectories(path, CORPUS, k)
    return [[passage.id for passage in step.passages] for step in trajectory.steps]


def test_questions(tmp_path: Path) -> None:
    metadata = {"type": "bridge", "supporting_ids": ["1", "2"]}
    full = {"id": 7, "question": "Qué?", "golden_answers": ["a", "b"], "metadata": metadata}
    first, second = qa.read_questions(write(tmp_path, full, "", QUESTION))
    assert first == Question("7", "Qué?", ("a", "b"), metadata)
    assert first.supporting_ids == ("1", "2")
    assert second == Question("q0", "Who wrote Ulysses?", ("James Joyce",), {})


def test_passages_in_both_layouts(tmp_path: Path) -> None:
    rows = [
        {"id": "0", "contents": '"Darwin"\nA naturalist.'},
        {"id": "1", "title": "Darwin", "text": "A naturalist."},
    ]
    first, second = qa.read_passages(write(tmp_path, *rows))
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
        (QUESTION | {"id": True}, "id must be a text; got true"),
        (QUESTION | {"id": "q1", "golden_answers": "a"}, 'golden_answers must be a list; got "a"'),
        (QUESTION | {"id": "q1", "golden_answers": []}, "golden_answers must be a list of one or"),
        (QUESTION | {"id": "q1", "golden_answers": [1]}, "golden_answers must be a list of one or"),
        (QUESTION | {"id": "q1", "metadata": []}, "metadata must be an object; got []"),
        (QUESTION, "ids must be unique; 'q0' is also on line 1"),
        (QUESTION | {"id": "\ud800"}, "expected Unicode text; got a lone surrogate escape"),
    ],
)
def test_fault_of_a_question_names_its_line(tmp_path: Path, line: object, expected: str) -> None:
    path = write(tmp_path, QUESTION, line)
    with pytest.raises(UserError) as error:
        qa.read_questions(path)
    assert str(error.value).startswith(f"{path}:2: {expected}")
    assert "\n" not in str(error.value)


def test_files_that_hold_nothing_readable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.jsonl: expected a readable .*No such file"):
        qa.read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="the file holds none"):
        qa.read_passages(write(tmp_path, "", "  "))
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(b'{"id": "0", "contents": "a"}\n{"id": "1", "contents": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin1\.jsonl:2: expected UTF-8; got byte 0xe9 at col"):
        qa.read_passages(path)


def test_an_escaped_emoji_is_text(tmp_path: Path) -> None:
    path = write(tmp_path, '{"id": "0", "contents": "\\ud83d\\ude00"}')
    assert qa.read_passages(path)[0].contents == "😀"


def test_teacher_trajectory(tmp_path: Path) -> None:
    (trajectory,) = qa.read_trajectories(write(tmp_path, teacher({"retrieved_ids": ["a"]})), CORPUS, 2)
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
        qa.read_trajectories(path, CORPUS, 2)
    assert str(error.value).startswith(f"{path}:1: {expected}")


def test_several_trajectories_of_a_question(tmp_path: Path) -> None:
    rows = [teacher({"retrieved_ids": ["a"]}, sample_index=i) for i in (0, 1)]
    assert [t.sample_index for t in qa.read_trajectories(write(tmp_path, *rows), CORPUS, 1)] == [
        0,
        1,
    ]
    with pytest.raises(UserError, match=r":2: ids must be unique"):
        qa.read_trajectories(write(tmp_path, rows[0], rows[0]), CORPUS, 1)


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
    row = json.loads(json.dumps(qa.trajectory_to_dict(trajectory)))
    assert qa.trajectory_from_dict(row) == trajectory


def test_recorded_trajectory_is_a_teachers_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rollouts.jsonl"
    qa.write_jsonl(path, [qa.trajectory_to_dict(recorded())])
    assert qa.read_trajectories(path, {}, 2) == [recorded()]


def test_unknown_status() -> None:
    row = qa.trajectory_to_dict(recorded()) | {"status": "DONE"}
    with pytest.raises(ValueError, match="status must be one of ANSWERED, NO_ANSWER, FORMAT_ERROR"):
        qa.trajectory_from_dict(row)


def test_written_questions_are_read_back(tmp_path: Path) -> None:
    questions = [Question(f"q{i}", "¿?\u2028", ("ñ",), {"hops": i}) for i in range(3)]
    path = tmp_path / "questions.jsonl"
    qa.write_jsonl(path, map(qa.question_to_dict, questions))
    assert qa.read_questions(path) == questions


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = write(tmp_path, QUESTION)
    before = path.read_bytes()

    def rows():
        yield QUESTION
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        qa.write_jsonl(path, rows())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

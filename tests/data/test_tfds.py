"""JSONL through tensorflow-datasets and array_record to grain batches equals direct reading."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.questions import question_to_dict, read_questions
from r3rag_jax.data.readers import tfds as tfds_builder
from r3rag_jax.data.records import OnError, Records
from r3rag_jax.data.sft import FlatSamples, SFTBatches, SFTSample
from r3rag_jax.data.trajectories import read_trajectories, teacher_rows, teacher_trajectory_from_dict
from r3rag_jax.errors import UserError
from r3rag_jax.types import Passage, Trajectory

pytest.importorskip("grain")
pytest.importorskip("tensorflow_datasets")

CORPUS = {str(i): Passage(str(i), f'"Título {i}"\nText {i}.') for i in range(30)}
NUM_ROWS = 500  # more than one block of an array_record file


def question(index: int) -> dict[str, object]:
    return {
        "id": f"q{index}",
        "question": f"¿Qué es {index}? 😀\n\x00",
        "golden_answers": [f"a{index}"] * (1 + index % 3),
        "metadata": {"hops": index, "nested": {"ids": [str(index)], "none": None}},
    }


def teacher(index: int) -> dict[str, object]:
    ids = [str((index + j) % 30) for j in range(4)]
    retrievals = [
        {"analysis": f"é{j}", "query": "q?", "retrieved_ids": ids, "passage_ids": ids[j : j + 1]}
        for j in range(index % 4)
    ]
    return question(index) | {
        "sample_index": index % 2,
        "steps": [*retrievals, {"analysis": "known", "answer": f"a{index}"}],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    write_jsonl(folder / "train.jsonl", map(question, range(NUM_ROWS)))
    write_jsonl(folder / "dev.jsonl", map(question, range(1)))
    write_jsonl(folder / "teacher.jsonl", map(teacher, range(NUM_ROWS)))
    return folder


def tokenize(trajectory: Trajectory) -> SFTSample:
    """Bytes of the question, to be learnt: bytes of the steps and the documents' ids."""
    prompt = trajectory.question.question.encode()
    steps = "".join(f"{s.analysis}{s.query}{s.answer}" for s in trajectory.steps).encode()
    ids = np.frombuffer(prompt + steps + ",".join(trajectory.retrieved_ids).encode(), np.uint8)
    return SFTSample(ids.astype(np.int32), np.arange(len(ids)) >= len(prompt))


def question_rows(path: Path, *paths: Path) -> dict[str, Records]:
    return {path.stem: read_questions(path).map(question_to_dict) for path in (path, *paths)}


def test_questions_keep_every_row_in_order(folder: Path) -> None:
    splits = question_rows(folder / "train.jsonl", folder / "dev.jsonl")
    directory = tfds_builder.build(splits, folder / "data", "questions")
    for split in splits:
        path = folder / f"{split}.jsonl"
        found = tfds_builder.open_split(directory, split, path)
        assert found == read_questions(path) and found.lines == read_questions(path).lines
        assert found.place(0) == f"{path}:1"
    assert len(tfds_builder.open_split(directory, "train", "")) == NUM_ROWS
    with pytest.raises(UserError, match=r"split must be one of \['dev', 'train'\]; got 'test'"):
        tfds_builder.open_split(directory, "test", "")


def test_trajectories_to_batches_equal_direct_reading(folder: Path) -> None:
    path = folder / "teacher.jsonl"
    direct = read_trajectories(path, CORPUS, 2)
    rows = teacher_rows(path, direct.lines)
    directory = tfds_builder.build({"sft": rows}, folder / "data", "trajectories")
    stored = tfds_builder.open_split(directory, "sft", path).map(
        lambda row: teacher_trajectory_from_dict(row, CORPUS, 2)
    )
    assert stored.is_stored and stored == direct

    options = {"row_length": 256, "batch_rows": 8, "epochs": 1, "seed": 0}
    samples = FlatSamples(stored.map(lambda trajectory: [tokenize(trajectory)]))
    shards = [SFTBatches(samples, rows=rows, **options) for rows in (range(4), range(4, 8))]
    from_jsonl = SFTBatches([tokenize(t) for t in direct], **options)
    for one, other, whole in zip(*shards, from_jsonl, strict=True):
        for field in ("tokens", "segment_ids", "loss_mask"):
            both = np.concatenate([getattr(one, field), getattr(other, field)])
            np.testing.assert_array_equal(both, getattr(whole, field))
    assert shards[0].num_examples == NUM_ROWS


def test_chosen_and_mapped_records_stay_where_they_are(folder: Path) -> None:
    path = folder / "train.jsonl"
    directory = tfds_builder.build(question_rows(path), folder / "data", "questions")
    stored, read = tfds_builder.open_split(directory, "train", path), read_questions(path)
    chosen = stored.take(range(1, NUM_ROWS, 7))
    assert chosen.is_stored and chosen == read.take(range(1, NUM_ROWS, 7)) and chosen.lines == list(range(2, 501, 7))
    assert chosen.ids == read.take(range(1, NUM_ROWS, 7)).ids
    assert chosen.map(lambda q: q.id) == [f"q{i}" for i in range(1, NUM_ROWS, 7)] and chosen[:2] == read[1:9:7]
    kept = OnError("skip", print).check(chosen, lambda q: "odd" if int(q.id[1:]) % 2 else None)
    assert kept.is_stored and [q.id for q in kept][:2] == ["q8", "q22"] and kept.place(0) == f"{path}:9"


def test_changed_content_is_built_anew(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    directories = []
    for count in (3, 5, 3):
        write_jsonl(path, map(question, range(count)))
        directories.append(tfds_builder.build(question_rows(path), tmp_path / "data", "questions"))
        assert len(tfds_builder.open_split(directories[-1], "train", path)) == count
    assert directories[0] == directories[2] != directories[1]


def test_source_is_a_sequence(folder: Path) -> None:
    directory = tfds_builder.build(question_rows(folder / "dev.jsonl"), folder / "data", "questions")
    source = tfds_builder.DataSource(directory, "dev")
    assert source[-1] == source[0] == source[np.int64(0)]
    with pytest.raises(IndexError):
        source[1]


def test_neither_tensorflow_nor_tfds_is_imported() -> None:
    code = (
        "import sys; import r3rag_jax.data.readers.tfds; "
        "assert not {'tensorflow', 'tensorflow_datasets', 'grain'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""JSONL through tensorflow-datasets and array_record to grain batches equals direct reading."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.questions import read_questions
from r3rag_jax.data.readers import tfds as tfds_builder
from r3rag_jax.data.sft import SFTBatches, SFTSample
from r3rag_jax.data.trajectories import read_trajectories, teacher_trajectory_from_dict
from r3rag_jax.errors import UserError
from r3rag_jax.types import Passage, Trajectory

grain = pytest.importorskip("grain")
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


def test_questions_keep_every_row_in_order(folder: Path) -> None:
    files = {"train": folder / "train.jsonl", "dev": folder / "dev.jsonl"}
    builder = tfds_builder.build(files, folder / "data", "questions")
    for split, path in files.items():
        source = tfds_builder.data_source(builder, split)
        assert list(source) == read_questions(path)
    assert len(tfds_builder.data_source(builder, "train")) == NUM_ROWS
    with pytest.raises(UserError, match=r"split must be one of \['dev', 'train'\]; got 'test'"):
        tfds_builder.data_source(builder, "test")


def test_trajectories_to_batches_equal_direct_reading(folder: Path) -> None:
    path = folder / "teacher.jsonl"
    builder = tfds_builder.build({"train": path}, folder / "data", "trajectories")
    direct = read_trajectories(path, CORPUS, 2)

    def read(row: dict[str, object]) -> Trajectory:
        return teacher_trajectory_from_dict(row, CORPUS, 2)

    source = grain.MapDataset.source(tfds_builder.data_source(builder, "train")).map(read)
    assert [source[i] for i in range(len(source))] == direct

    options = {"row_length": 256, "batch_rows": 8, "epochs": 1, "seed": 0}
    from_tfds = SFTBatches(source.map(tokenize), **options)
    from_jsonl = SFTBatches([tokenize(t) for t in direct], **options)
    for a, b in zip(from_tfds, from_jsonl, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.segment_ids, b.segment_ids)
        np.testing.assert_array_equal(a.loss_mask, b.loss_mask)
    assert from_tfds.num_examples == NUM_ROWS


def test_changed_content_is_built_anew(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    for count in (3, 5):
        write_jsonl(path, map(question, range(count)))
        builder = tfds_builder.build({"train": path}, tmp_path / "data", "questions")
        assert len(tfds_builder.data_source(builder, "train")) == count


def test_faulty_row_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [question(0), question(1) | {"golden_answers": []}])
    with pytest.raises(UserError, match=r"train\.jsonl:2: golden_answers must be one or more texts"):
        tfds_builder.build({"train": path}, tmp_path / "data", "questions")
    assert not (tmp_path / "data").exists()


def test_source_is_a_sequence(folder: Path) -> None:
    builder = tfds_builder.build({"dev": folder / "dev.jsonl"}, folder / "data", "questions")
    source = tfds_builder.data_source(builder, "dev")
    assert source[-1] == source[0] == source[np.int64(0)]
    with pytest.raises(IndexError):
        source[1]


def test_neither_tensorflow_nor_tfds_is_imported() -> None:
    code = (
        "import sys; import r3rag_jax.data.readers.tfds; "
        "assert not {'tensorflow', 'tensorflow_datasets', 'grain'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

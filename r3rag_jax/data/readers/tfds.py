"""FlashRAG JSONL as a tensorflow-datasets data set in array_record files, without TensorFlow.

Without TensorFlow, only the pair of `file_format="array_record"` and `as_data_source` reads back every row (parquet
loses rows, `as_dataset` needs TensorFlow). tfds cannot nest the steps of a trajectory without TensorFlow, so they are
stored as JSON text, and so is the metadata.

`tensorflow_datasets` is imported inside the functions, because only users of this reader need it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from r3rag_jax.data.jsonl import read_rows
from r3rag_jax.data.questions import question_to_dict, read_questions
from r3rag_jax.data.readers.flashrag import question_from_dict
from r3rag_jax.data.trajectories import read_trajectories
from r3rag_jax.errors import UserError
from r3rag_jax.types import Passage, Question

Kind = Literal["questions", "trajectories"]


def build(files: Mapping[str, str | Path], data_dir: str | Path, kind: Kind) -> Any:
    """Convert each split's JSONL file into `data_dir`, unless the same content is already there.

    Args:
        files: split name -> JSONL file, as `read_questions` or `read_trajectories` read it.

    Returns:
        The prepared `tfds.core.DatasetBuilder`, for `data_source`.

    Raises:
        UserError: a row breaks a rule; names file and line.
        RuntimeError: rows were lost in writing.
    """
    counts = {split: _check(path, kind) for split, path in files.items()}
    builder_class, config_class = _tfds_classes()
    config = config_class(
        name=f"{kind}_{_fingerprint(files)}",  # other content is another data set: never stale
        kind=kind,
        files={split: str(path) for split, path in files.items()},
    )
    builder = builder_class(data_dir=str(data_dir), config=config, file_format="array_record")
    builder.download_and_prepare()
    for split, count in counts.items():
        if (written := len(data_source(builder, split))) != count:
            raise RuntimeError(f"split {split!r} must hold its {count} rows; {written} were written")
    return builder


def data_source(builder: Any, split: str) -> DataSource:
    """Random access to the rows of a split, in the order of its file; UserError if it has none."""
    if split not in builder.info.splits:
        raise UserError(f"split must be one of {sorted(builder.info.splits)}; got {split!r}")
    return DataSource(builder.as_data_source(split=split))


class DataSource(Sequence[Any]):
    """Rows of a split: a Question, or the dict of a trajectory, which `teacher_trajectory_from_dict` parses.

    A source for `grain.MapDataset.source`: random access, safe to read from several threads.
    """

    def __init__(self, records: Any) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        record = self._records[range(len(self))[index]]  # IndexError ends an iteration
        row: dict[str, Any] = {
            "id": record["id"].decode("utf-8"),
            "question": record["question"].decode("utf-8"),
            "golden_answers": [answer.decode("utf-8") for answer in record["golden_answers"]],
            "metadata": json.loads(record["metadata"]),
        }
        if "steps" not in record:
            return question_from_dict(row)
        steps = [json.loads(step) for step in record["steps"]]
        return row | {"sample_index": int(record["sample_index"]), "steps": steps}


def _check(path: str | Path, kind: Kind) -> int:
    """Number of rows of a file; UserError if one is not well formed."""
    if kind == "questions":
        return len(read_questions(path))
    return len(read_trajectories(path, _AnyCorpus(), passages_per_step=1))


class _AnyCorpus(dict[str, Passage]):
    """A corpus that holds every id: the passages of a trajectory are looked up when it is read, not here."""

    def __missing__(self, passage_id: str) -> Passage:
        return Passage(id=passage_id, contents="")


def _fingerprint(files: Mapping[str, str | Path]) -> str:
    digest = hashlib.sha256()
    for split in sorted(files):
        content = hashlib.sha256(Path(files[split]).read_bytes()).hexdigest()
        digest.update(f"{split}={content};".encode())
    return digest.hexdigest()[:16]


def _examples(path: str, kind: Kind) -> Iterator[tuple[int, dict[str, Any]]]:
    """(key, features) of each row; the keys are in file order, which tfds keeps."""
    for number, row in read_rows(path):
        question: Question = question_from_dict(row)
        example: dict[str, Any] = question_to_dict(question)
        example["metadata"] = json.dumps(example["metadata"], ensure_ascii=False)
        if kind == "trajectories":
            example["sample_index"] = row.get("sample_index") or 0
            example["steps"] = [json.dumps(step, ensure_ascii=False) for step in row["steps"]]
        yield number, example


@functools.cache  # tfds registers a builder class by name, once
def _tfds_classes() -> tuple[Any, Any]:
    """The builder and its config; defined here because their base classes are tfds's."""
    import dataclasses

    import numpy as np
    import tensorflow_datasets as tfds

    @dataclasses.dataclass
    class FlashRAGConfig(tfds.core.BuilderConfig):
        kind: Kind = "questions"
        files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    class FlashRAG(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        # Nothing is downloaded. tfds would look for checksums beside this file, and for that
        # imports importlib_resources, which it does not install.
        url_infos = None

        def _info(self) -> Any:
            text = tfds.features.Text()
            features: dict[str, Any] = {
                "id": text,
                "question": text,
                "golden_answers": tfds.features.Sequence(text),
                "metadata": text,  # JSON
            }
            if self.builder_config.kind == "trajectories":
                features["sample_index"] = np.int64
                features["steps"] = tfds.features.Sequence(text)  # JSON, one object a step
            return tfds.core.DatasetInfo(
                builder=self,
                description="Questions or trajectories in FlashRAG's layout.",
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,  # rows keep the order of their file
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            files = self.builder_config.files
            return {split: self._generate_examples(path) for split, path in files.items()}

        def _generate_examples(self, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
            return _examples(path, self.builder_config.kind)

    return FlashRAG, FlashRAGConfig

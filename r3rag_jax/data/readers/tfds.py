"""Questions and trajectories as a tensorflow-datasets data set in array_record files, without TensorFlow.

`data.storage=array_record` keeps a run's records so: training reads them by random access, and no process holds all of
them. Without TensorFlow, only the pair of `file_format="array_record"` and `as_data_source` reads back every row
(parquet loses rows, `as_dataset` needs TensorFlow). tfds cannot nest the steps of a trajectory without TensorFlow, so
they are stored as JSON text, and so is the metadata.

`tensorflow_datasets` is imported inside the functions, because only users of this storage need it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from r3rag_jax.data.fields import Row
from r3rag_jax.data.readers.flashrag import question_from_dict
from r3rag_jax.data.records import Records
from r3rag_jax.errors import UserError

Kind = Literal["questions", "trajectories"]


def build(splits: Mapping[str, Records[Row]], data_dir: str | Path, kind: Kind) -> Path:
    """Write records as a data set below `data_dir`, unless the same content is already there.

    Args:
        splits: split name -> rows `{id, question, golden_answers, metadata}`, of trajectories also with `steps`, an
            object each, and `sample_index`; their lines are stored, too.

    Returns:
        The directory of the data set, for `open_split`.

    Raises:
        RuntimeError: rows were lost in writing.
    """
    builder_class, config_class = _tfds_classes()
    # Other content is another data set: never stale.
    config = config_class(name=f"{kind}_{_digest(splits, kind)}", kind=kind, splits=splits)
    with _silent():
        builder = builder_class(data_dir=str(data_dir), config=config, file_format="array_record")
        builder.download_and_prepare()
    directory = Path(builder.data_dir)
    for split, records in splits.items():
        if (written := len(DataSource(directory, split))) != len(records):
            raise RuntimeError(f"split {split!r} must hold its {len(records)} rows; {written} were written")
    return directory


def open_split(directory: Path, split: str, path: str | Path) -> Records[Any]:
    """The records of a split, in the order of its file: a Question each, or the row of a trajectory.

    Args:
        path: the file that they were read from, for messages.

    Raises:
        UserError: the data set has no such split.
    """
    source = DataSource(directory, split)
    lines, ids = source.lines_and_ids()
    return Records.stored(path, lines, source, ids)


class DataSource(Sequence[Any]):
    """Rows of a split: a Question, or the dict of a trajectory, which `teacher_trajectory_from_dict` parses.

    A source for `grain.MapDataset.source`: random access, safe to read from several threads.
    """

    def __init__(self, directory: Path, split: str) -> None:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(str(directory))
        if split not in builder.info.splits:
            raise UserError(f"split must be one of {sorted(builder.info.splits)}; got {split!r}")
        self._records = builder.as_data_source(split=split)

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

    def lines_and_ids(self) -> tuple[list[int], list[str]]:
        """The line of each row in the file that it comes from, and its id."""
        records = (self._records[index] for index in range(len(self)))
        pairs = [(int(record["line"]), record["id"].decode("utf-8")) for record in records]
        return [line for line, _ in pairs], [id for _, id in pairs]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what tfds says of a download that there is none of from the user's terminal; its errors are raised."""
    import tensorflow_datasets as tfds
    from absl import logging

    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _examples(records: Records[Row], kind: Kind) -> Iterator[tuple[int, dict[str, Any]]]:
    """(key, features) of each row; the keys are in file order, which tfds keeps."""
    for line, row in zip(records.lines, records, strict=True):
        example: dict[str, Any] = {
            "id": row["id"],
            "question": row["question"],
            "golden_answers": list(row["golden_answers"]),
            "metadata": json.dumps(row["metadata"], ensure_ascii=False),
            "line": line,
        }
        if kind == "trajectories":
            example["sample_index"] = row["sample_index"]
            example["steps"] = [json.dumps(step, ensure_ascii=False) for step in row["steps"]]
        yield line, example


def _digest(splits: Mapping[str, Records[Row]], kind: Kind) -> str:
    digest = hashlib.sha256()
    for split in sorted(splits):
        digest.update(f"{split}\n".encode())
        for _, example in _examples(splits[split], kind):
            digest.update(json.dumps(example, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


@functools.cache  # tfds registers a builder class by name, once
def _tfds_classes() -> tuple[Any, Any]:
    """The builder and its config; defined here because their base classes are tfds's."""
    import dataclasses

    import numpy as np
    import tensorflow_datasets as tfds

    @dataclasses.dataclass
    class FlashRAGConfig(tfds.core.BuilderConfig):
        kind: Kind = "questions"
        splits: Mapping[str, Records[Row]] = dataclasses.field(default_factory=dict)

    class FlashRAG(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.1.0")
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
                "line": np.int64,
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
            splits, kind = self.builder_config.splits, self.builder_config.kind
            return {split: _examples(records, kind) for split, records in splits.items()}

        def _generate_examples(self, records: Records[Row]) -> Iterator[tuple[int, dict[str, Any]]]:
            return _examples(records, self.builder_config.kind)

    return FlashRAG, FlashRAGConfig

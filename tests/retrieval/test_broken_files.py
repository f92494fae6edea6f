"""Files of indexes and encoders that somebody has changed, with digests that fit: each is named, and nothing crashes.

Most of these were found by `python -m tests.fuzz`; what they raised before stands beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import encyclopedia

from r3rag_jax.errors import UserError
from r3rag_jax.models.paths import reading
from r3rag_jax.retrieval.arrays import open_array
from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.encoders.sentence_transformers import read_max_length, read_pooling, read_prefix
from r3rag_jax.retrieval.manifest import MANIFEST_FILE, read_manifest, write_manifest
from r3rag_jax.retrieval.store import DATA_FILE, OFFSETS_FILE, PassageStore, write_store
from r3rag_jax.retrieval.vectors import VectorShards, write_shard

PASSAGES = encyclopedia()[:4]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    corpus = write_store(tmp_path, PASSAGES)
    write_shard(tmp_path, 0, np.eye(4, dtype=np.float32))
    write_manifest(tmp_path, "faiss", 4, corpus, {"encoder": "e"}, {})
    return tmp_path


HEADER = b"\x93NUMPY\x01\x00\x46\x00"
ARRAYS = {
    "nothing": b"",
    "a zip archive": b"PK\x03\x04" + b"x" * 200,  # zipfile.BadZipFile
    "a pickle": b"\x80\x04\x95" + b"x" * 200,
    "a header that is no Python": HEADER + b"{'descr': (" + b" " * 59,  # tokenize.TokenError
    "a header with a NUL": HEADER + b"{'descr': '<f4', \x00" + b" " * 53,  # SyntaxError
    "objects": HEADER + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(69) + b"\n" + b"x" * 99,
    "a shape beyond the file": HEADER
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999,), }".ljust(69) + b"\n",
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_no_array_is_named(index: Path, name: str) -> None:
    path = index / "vectors-00000.npy"
    path.write_bytes(ARRAYS[name])
    for read in (open_array, lambda path: VectorShards.open(path.parent)):
        with pytest.raises(UserError, match=rf"{path} must be an array in numpy's format"):
            read(path)
    (index / OFFSETS_FILE).write_bytes(ARRAYS[name])
    with pytest.raises(UserError, match=rf"{OFFSETS_FILE} must be an array in numpy's format.*Build the index again"):
        PassageStore(index)


@pytest.mark.parametrize(
    "line",
    [b'{"id": "p0"}', b'{"id": 1, "contents": "x"}', b"[1]", b'{"id": "p0", "contents": "\xff"}', b"{", b"[" * 99],
    ids=["no contents", "a number", "no object", "no UTF-8", "half a line", "too deep"],
)  # KeyError, JSONDecodeError, UnicodeDecodeError, in the middle of a search
def test_a_passage_that_is_none_is_named(index: Path, line: bytes) -> None:
    path = index / DATA_FILE
    offsets = np.load(index / OFFSETS_FILE)
    data = bytearray(path.read_bytes())
    data[offsets[1] : offsets[2]] = line[: offsets[2] - offsets[1] - 1].ljust(int(offsets[2] - offsets[1]) - 1) + b"\n"
    path.write_bytes(bytes(data))
    store = PassageStore(index)
    assert store.at(0) == PASSAGES[0] and store.at(2) == PASSAGES[2]
    with pytest.raises(UserError, match=rf"{path}, passage 2: expected an object with id and contents"):
        store.at(1)


def set_file_name(row: dict[str, Any]) -> None:
    row["files"]["../../outside"] = row["files"].pop(DATA_FILE)


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a file outside of the directory": set_file_name,
    "an absolute one": lambda row: row["files"].update({"/etc/passwd": row["files"][DATA_FILE]}),
    "a size that is a text": lambda row: row["files"][DATA_FILE].update(size="9"),
    "files that are a list": lambda row: row.update(files=[1]),
    "a kind that is a list": lambda row: row.update(kind=["faiss"]),
    "a number of passages below 0": lambda row: row.update(num_passages=-1),
    "a fingerprint that is a number": lambda row: row["depends_on"].update(encoder=7),
    "another field": lambda row: row.update(more=1),
    "no corpus": lambda row: row.pop("corpus"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_of_another_shape_is_named(index: Path, name: str) -> None:
    path = index / MANIFEST_FILE
    row = json.loads(path.read_text())
    read_manifest(index)
    MANIFESTS[name](row)
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=rf"{path} must have the keys of an index's fingerprint"):
        read_manifest(index)


def test_an_encoder_file_with_any_byte_changed_is_an_encoder_or_named(tmp_path: Path) -> None:
    """zipfile raises NotImplementedError for a version that it does not know, and others for other fields."""
    HashEncoder(dim=16).fit(["a harbor", "a river"]).save(tmp_path)
    path = tmp_path / "encoder.npz"
    content = path.read_bytes()
    num_named = 0
    for start in range(0, len(content), 7):
        path.write_bytes(content[:start] + bytes([content[start] ^ 0xFF]) + content[start + 1 :])
        try:
            HashEncoder.load(path)
        except UserError as error:
            assert str(path) in str(error)
            num_named += 1
    assert num_named > 10


@pytest.mark.parametrize(
    ("file", "content", "rule"),
    [
        ("sentence_bert_config.json", '{"max_seq_length": "32"}', "must hold max_seq_length, at least 3; got '32'"),
        ("sentence_bert_config.json", '{"max_seq_length": -1}', "must hold max_seq_length, at least 3; got -1"),
        ("sentence_bert_config.json", "[]", "must hold an object; got list"),
        ("config_sentence_transformers.json", '{"prompts": [1]}', "must hold prompts, an object; got [1]"),
        ("config_sentence_transformers.json", '{"prompts": {"query": 1}}', "must hold prompts as texts"),
        ("modules.json", '[{"type": "x.Pooling", "path": "../../elsewhere"}]', "a path in its directory; got"),
        ("modules.json", '[{"type": 1, "path": ""}]', "must list objects with a type and a path"),
        ("modules.json", "[1]", "must list objects with a type and a path"),
    ],
)
def test_files_of_sentence_transformers_of_another_shape_are_named(
    tmp_path: Path, file: str, content: str, rule: str
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as error, reading(tmp_path):
        read_max_length(tmp_path, 0, 64)
        read_prefix(tmp_path, "auto", "query")
        read_pooling(tmp_path, "auto")
    assert rule in str(error.value) and file in str(error.value)


def test_a_default_prompt_that_is_no_name_is_none(tmp_path: Path) -> None:
    """TypeError: unhashable type."""
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": {"x": "y"}, "default_prompt_name": []}')
    assert read_prefix(tmp_path, "auto", "query") == ""

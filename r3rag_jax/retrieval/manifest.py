"""An index directory: what kind of index it holds, the digests of every file, and what it was built with.

`fingerprint.json` names the layout, the kind, the fingerprints of what the index depends on, and all files. It is
written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from r3rag_jax.errors import UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.run.digests import file_digest
from r3rag_jax.run.files import write_text

MANIFEST_FILE = "fingerprint.json"
LAYOUT = 3  # of the files in an index directory; another one is refused
AGAIN = "Build the index again."
SMALL = 4 << 20  # bytes; a file up to this size is read whole when an index is opened
NUM_SAMPLES, SAMPLE = 16, 16 << 10  # of a larger file: blocks that are read instead, and their bytes
READERS = 8  # threads that read files, so that a disk has several requests at once


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What a file of an index was when it was built."""

    size: int  # bytes
    sample: str  # `sample_digest`, compared whenever the index is opened
    sha256: str  # of all bytes, compared on request


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `fingerprint.json`."""

    kind: str  # key of `factory.RETRIEVERS`
    num_passages: int
    corpus: str  # fingerprint of the passages
    depends_on: Mapping[str, str]  # name -> fingerprint of what else the index depends on, e.g. its encoder
    files: Mapping[str, FileRecord]  # path in the directory -> what it was
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keys of `retrieval` it was built with
    layout: int = LAYOUT

    def check_encoder(self, fingerprint: str, directory: Path) -> None:
        """Compare an encoder with the one that the index in `directory` was built with.

        Raises:
            UserError: it is another one.
        """
        if fingerprint != (built := self.depends_on.get("encoder")):
            raise UserError(
                f"the encoder must be the one that the index in {directory} was built with (the encoder file there "
                f"describes it; fingerprint {built}); got {fingerprint}. {AGAIN}"
            )

    def overrides(self) -> list[str]:
        """The keys of `retrieval` that the index was built with, as `key=value`."""
        return list(_words({"kind": self.kind, **self.config}, "retrieval"))


def _words(keys: Mapping[str, Any], section: str) -> Iterator[str]:
    for name, value in keys.items():
        dotted = f"{section}.{name}"
        if isinstance(value, Mapping):
            yield from _words(value, dotted)
        else:
            yield f"{dotted}={json.dumps(value)}"


def has_index(directory: Path) -> bool:
    """Whether the directory holds an index."""
    return (directory / MANIFEST_FILE).is_file()


def write_manifest(
    directory: Path,
    kind: str,
    num_passages: int,
    corpus: str,
    depends_on: Mapping[str, str],
    config: Mapping[str, Any],
) -> None:
    """Write `fingerprint.json` for the files in the directory, except hidden ones and those of databases.

    A database (Milvus Lite) is a directory NAME.db, whose files change when it is opened.
    """
    files_of = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    paths = sorted(
        directory / path
        for path in files_of
        if not path.name.startswith(".") and not any(parent.suffix == ".db" for parent in path.parents)
    )
    files = {
        path.relative_to(directory).as_posix(): FileRecord(path.stat().st_size, sample_digest(path), file_digest(path))
        for path in paths
    }
    manifest = dataclasses.asdict(Manifest(kind, num_passages, corpus, depends_on, files, config))
    write_text(directory / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read `fingerprint.json`.

    Raises:
        UserError: it is missing, is not well formed, or names another layout.
    """
    path = directory / MANIFEST_FILE
    try:
        row = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"an index directory holds {path.name}; {path} is missing") from error
    except ValueError as error:
        raise UserError(f"{path} must be a JSON object: {error}. {AGAIN}") from error
    layout = row.get("layout", 1) if isinstance(row, dict) else None
    if layout != LAYOUT:
        raise UserError(
            f"{path} must describe an index of layout {LAYOUT}; got layout {layout}. Remove {directory} and build the "
            "index again: python -m r3rag_jax.index build, or the training command with phase index"
        )
    try:
        files = {name: FileRecord(**file) for name, file in row.pop("files").items()}
        manifest = Manifest(**row, files=files)
        _check_types(manifest)
        return manifest
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} must have the keys of an index's fingerprint: {error}. {AGAIN}") from error


def _check_types(manifest: Manifest) -> None:
    """Raise a TypeError where a field holds a value of another type, or the name of a file outside of the directory."""
    texts = (manifest.kind, manifest.corpus, *manifest.depends_on.values())
    if not all(isinstance(text, str) for text in texts) or not isinstance(manifest.config, dict):
        raise TypeError("kind, corpus and what it depends on are texts, config is an object")
    if type(manifest.num_passages) is not int or manifest.num_passages < 0:
        raise TypeError(f"num_passages is a number; got {manifest.num_passages!r}")
    for name, file in manifest.files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
            raise TypeError(f"files are in the directory; got {name!r}")
        if type(file.size) is not int or not isinstance(file.sample, str) or not isinstance(file.sha256, str):
            raise TypeError(f"{name} has a size and two digests")


def check_index(directory: Path, kind: str) -> Manifest:
    """The manifest of an index of this kind, after all its files were checked.

    Raises:
        UserError: the index is of another kind, or as `check_files`.
    """
    manifest = read_manifest(directory)
    if manifest.kind != kind:
        raise UserError(f"{directory} must hold an index of retrieval.kind={kind}; got one of {manifest.kind}")
    check_files(directory, manifest, manifest.files)
    return manifest


def check_files(directory: Path, manifest: Manifest, names: Iterable[str], *, reads_all: bool = False) -> None:
    """Compare files of an index with the manifest: sizes and samples, or, where `reads_all`, every byte.

    Samples find a file that was cut, replaced or written only in part; of files larger than SMALL they do not find a
    changed byte between two samples.

    Raises:
        UserError: a file is missing, or is not the one that was written.
    """

    def check(name: str) -> None:
        path, expected = directory / name, manifest.files.get(name)
        if not path.is_file():
            raise UserError(f"an index directory holds {name}; {path} is missing. {AGAIN}")
        if expected is None:
            raise UserError(f"{directory / MANIFEST_FILE} must list {name}; it does not. {AGAIN}")
        if (size := path.stat().st_size) != expected.size:
            raise UserError(f"{path} must be the file that was built, of {expected.size} bytes; got {size}. {AGAIN}")
        found = file_digest(path) if reads_all else sample_digest(path)
        if found != (digest := expected.sha256 if reads_all else expected.sample):
            raise UserError(f"{path} must be the file that was built, of SHA-256 {digest}; got {found}. {AGAIN}")

    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(check, names):  # raises the error of the first file that has one
            pass


def sample_digest(path: Path) -> str:
    """Hex SHA-256 of a file of at most SMALL bytes; of NUM_SAMPLES blocks, evenly spaced, of a larger one."""
    size = path.stat().st_size
    if size <= SMALL:
        return file_digest(path)
    sha = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for number in range(NUM_SAMPLES):
            file.seek((size - SAMPLE) * number // (NUM_SAMPLES - 1))
            sha.update(file.read(SAMPLE))
    return sha.hexdigest()

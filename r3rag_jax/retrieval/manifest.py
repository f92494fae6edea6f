"""An index directory: what kind of index it holds, the digest of every file, and how it is written.

`fingerprint.json` names the layout, the kind, the fingerprints of what the index depends on, and all files; it is
written last, and a directory appears with all of its files or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from r3rag_jax.errors import UserError
from r3rag_jax.run.digests import file_digest
from r3rag_jax.run.files import flush_directory, write_text

MANIFEST_FILE = "fingerprint.json"
LAYOUT = 2  # of the files in an index directory; another one is refused
AGAIN = "Build the index again."


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `fingerprint.json`."""

    kind: str  # key of `factory.RETRIEVERS`
    num_passages: int
    corpus: str  # fingerprint of the passages
    depends_on: Mapping[str, str]  # name -> fingerprint of what else the index depends on, e.g. its encoder
    files: Mapping[str, str]  # path in the directory -> SHA-256
    layout: int = LAYOUT


def has_index(directory: Path) -> bool:
    """Whether the directory holds an index."""
    return (directory / MANIFEST_FILE).is_file()


def write_manifest(directory: Path, kind: str, num_passages: int, corpus: str, depends_on: Mapping[str, str]) -> None:
    """Write `fingerprint.json` for the files in the directory."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = {path.relative_to(directory).as_posix(): file_digest(path) for path in paths}
    manifest = dataclasses.asdict(Manifest(kind, num_passages, corpus, depends_on, files))
    write_text(directory / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read `fingerprint.json`.

    Raises:
        UserError: it is missing, is not well formed, or names another layout.
    """
    path = directory / MANIFEST_FILE
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
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
        return Manifest(**row)
    except TypeError as error:
        raise UserError(f"{path} must have the keys of an index's fingerprint: {error}. {AGAIN}") from error


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


def check_files(directory: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare files of an index with their digests in the manifest.

    Raises:
        UserError: a file is missing, or is not the one that was written.
    """
    for name in names:
        path, expected = directory / name, manifest.files.get(name)
        if not path.is_file():
            raise UserError(f"an index directory holds {name}; {path} is missing. {AGAIN}")
        if (found := file_digest(path)) != expected:
            raise UserError(f"{path} must be the file that was built, of SHA-256 {expected}; got {found}. {AGAIN}")


@contextlib.contextmanager
def replaced_directory(directory: Path) -> Iterator[Path]:
    """An empty directory that takes the place of `directory` when the block ends, and is deleted when it raises."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        yield new
        flush_directory(new)
        has_old = directory.exists()
        if has_old:  # a directory cannot be renamed onto one that is not empty
            os.rename(directory, old)
        try:
            os.rename(new, directory)
        except OSError:
            if has_old:
                os.rename(old, directory)
            raise

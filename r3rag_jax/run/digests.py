"""Digests of files: remembered by size and time of change, or kept beside the files, which are compared with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from r3rag_jax.errors import UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.run.files import write_json, write_text

# What a model's behaviour depends on, in its Hugging Face directory: weights, configurations, tokenizer, template.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
SETTINGS_FILES = MODEL_FILES[1:]  # without the weights
SUMS_FILE = "SHA256SUMS"  # in a directory of files that a run wrote, in the format of `sha256sum -c`
PROVENANCE_FILE = "provenance.json"  # in a trained policy's directory: what it was trained from; no part of the model

Stamp = list[int]  # size in bytes, time of change in ns


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: Path) -> Stamp:
    """Size and time of change of a file."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def write_sums(directory: Path, names: Iterable[str]) -> None:
    """Record the digests of files in a directory, in its `SHA256SUMS`; those of other files stay."""
    sums = read_sums(directory) | {name: file_digest(directory / name) for name in names}
    write_text(directory / SUMS_FILE, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def read_sums(directory: Path) -> dict[str, str]:
    """File name -> hex SHA-256, as `write_sums` has recorded them; empty where there is no record.

    Raises:
        UserError: a line is none of the format.
    """
    path = directory / SUMS_FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for number, line in enumerate(lines, 1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            raise UserError(f"{path}:{number} must be a SHA-256, two blanks and a file name; got {line[:100]!r}")
        found[name] = digest
    return found


def check_sums(directory: Path, names: Iterable[str] | None = None, *, remedy: str) -> None:
    """Compare files with the record beside them; what is not recorded is not compared.

    Args:
        names: which files; all of the record by default.
        remedy: what a user may do, the end of the error.

    Raises:
        UserError: a file is missing, or is not the one that was written.
    """
    sums = read_sums(directory)
    for name in sums if names is None else [name for name in names if name in sums]:
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} must be there: {directory / SUMS_FILE} lists it. {remedy}")
        if (found := file_digest(path)) != sums[name]:
            raise UserError(
                f"{path} must be the file that the run wrote, of SHA-256 {sums[name][:16]}; got {found[:16]}. {remedy}"
            )


class FileDigests:
    """Digests of files by path, in a JSON file that is read again at each call and may be deleted at any time.

    With several processes, process 0 alone uses it.
    """

    def __init__(self, path: Path):
        self._path = path

    def get(self, file: Path, kind: str = "sha256", compute: Callable[[Path], str] = file_digest) -> str:
        """The digest of a file: the remembered one, unless the file's size or time of change differs.

        Args:
            kind: name of what `compute` returns; digests of different kinds are kept apart.

        Raises:
            OSError: the file cannot be read.
        """
        key, now = self._key(file, kind), stamp(file)
        known = self._read().get(key)
        if isinstance(known, dict) and known.get("stamp") == now and isinstance(known.get("digest"), str):
            return known["digest"]
        digest = compute(file)
        self.record(file, kind, digest, now)
        return digest

    def record(self, file: Path, kind: str, digest: str, seen: Stamp) -> None:
        """Remember the digest of a file, whose `stamp` was `seen` before it was read."""
        write_json(self._path, self._read() | {self._key(file, kind): {"stamp": seen, "digest": digest}})

    def knows(self, file: Path, kind: str) -> bool:
        """Whether a digest of the file, as it is or as it was, is remembered."""
        return self._key(file, kind) in self._read()

    def of_model(self, directory: Path, patterns: Iterable[str] = MODEL_FILES) -> str:
        """Hex SHA-256 of names and contents of the files in a Hugging Face directory that match a pattern."""
        files = sorted(
            {path for pattern in patterns for path in directory.glob(pattern)} - {directory / PROVENANCE_FILE}
        )
        lines = "".join(f"{self.get(file)}  {file.name}\n" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def _read(self) -> dict[str, Any]:
        try:
            content = parse_json(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @staticmethod
    def _key(file: Path, kind: str) -> str:
        return f"{kind} {file.absolute()}"

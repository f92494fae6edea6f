"""Files that appear whole or not at all: after a crash or on a full disk the old content is there, or the new.

All files of a run are written by these functions. A file that grows by lines may end in half a line; `keep_rows` drops
it before the next one.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from r3rag_jax.json_text import parse_json

SUFFIX = ".partial"
SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy's only words for a full disk


@contextlib.contextmanager
def open_atomic(path: str | Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file that replaces `path` when the block ends, and is deleted when the block raises.

    The text goes to a hidden file beside `path`, is flushed to disk, and the file is renamed. Missing parent
    directories are created.
    """
    with open_atomic_binary(path) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        try:
            yield file
            file.flush()
        finally:
            file.detach()  # the binary file is closed by its own block


@contextlib.contextmanager
def open_atomic_binary(path: str | Path) -> Iterator[BinaryIO]:
    """As `open_atomic`, for bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}{SUFFIX}")
    try:
        with naming(path), partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the operating system in the block that name no file, such as a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None and SHORT_WRITE.fullmatch(str(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def new_directory(path: Path, *, is_writer: bool = True) -> Iterator[Path]:
    """Give the path of a directory that becomes `path` when the block ends, and is deleted when the block raises.

    Its files are flushed to disk before it is renamed. What a killed process left of it is deleted first.

    Args:
        path: there must be none, or an empty directory.
        is_writer: whether this process writes; the others only get the path.
    """
    path = path.absolute()  # Path(".") has no name
    partial = path.with_name(f".{path.name}{SUFFIX}")
    try:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        yield partial
        if is_writer:
            flush_directory(partial)
            partial.rename(path)
    finally:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)


def flush_directory(directory: Path) -> None:
    """Wait until a directory and everything in it is on disk."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_partial(path: Path) -> bool:
    """Whether a file or directory is what a killed process left behind."""
    return path.name.startswith(".") and path.suffix == SUFFIX


def write_text(path: str | Path, text: str) -> None:
    """Write a text file by `open_atomic`."""
    with open_atomic(path) as file:
        file.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write an indented JSON file by `open_atomic`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_rows(path: Path, rows: Iterable[Any]) -> None:
    """Append JSON objects to a JSONL file, one a line, and flush them to the operating system."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSONL file with those lines alone that hold an object which is to be kept; they stay as they are.

    What is no object is dropped: the half line of a process that was killed, or what another program has written.
    """

    def is_kept(line: bytes) -> bool:
        try:
            row = parse_json(line.decode("utf-8"))
        except ValueError:
            return False
        return isinstance(row, dict) and keep(row)

    lines = path.read_bytes().split(b"\n")
    with open_atomic(path) as file:
        file.writelines(line.decode("utf-8") + "\n" for line in lines if is_kept(line))

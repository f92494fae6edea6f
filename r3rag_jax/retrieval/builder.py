"""Builds an index directory, which appears whole or not at all; a build that was killed is continued.

An index is built in `.NAME.partial` beside its directory NAME: passages, what a kind of retriever adds to them, and the
manifest. A stage that takes long writes many files, each of which appears whole, and `resume_stage` keeps those of an
earlier process if they were written for the same corpus and settings. The directory then takes the place of NAME.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from r3rag_jax.errors import UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.retrieval.manifest import write_manifest
from r3rag_jax.retrieval.store import PassageStore, write_store
from r3rag_jax.run.files import SUFFIX, flush_directory, write_json
from r3rag_jax.run.lock import HELD
from r3rag_jax.types import Passage

# Writes the files of a kind of retriever beside a store, in its directory; returns what else the index depends on.
WriteFiles = Callable[[PassageStore, Path], Mapping[str, str]]
# In the directory while an index is built.
LOCK, RECIPE, CORPUS, STAGE = ".lock", ".recipe.json", ".corpus.json", ".stage-{}.json"


def write_index(
    directory: Path,
    kind: str,
    passages: Iterable[Passage],
    write_files: WriteFiles,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write an index directory whole or not at all; an index that was there is replaced.

    Args:
        config: keys of `retrieval` that describe the index; a build with others is not continued.

    Raises:
        UserError: there are no passages, two have the same id, another process builds the same index, or `write_files`
            raised it.
    """
    with _building(directory, {"kind": kind, **(config or {})}) as new:
        corpus = write_store(new, passages)
        if _read(new / CORPUS) != corpus:  # what an earlier process has written is of other passages
            for record in new.glob(STAGE.format("*")):
                record.unlink()
            write_json(new / CORPUS, corpus)
        store = PassageStore(new)
        depends_on = write_files(store, new)
        write_manifest(new, kind, len(store), corpus, depends_on, config or {})


def resume_stage(directory: Path, name: str, facts: Mapping[str, Any], pattern: str) -> None:
    """Keep the files `pattern` of a stage if an earlier process wrote them with the same facts, or else delete them.

    Args:
        directory: where the index is built.
        facts: JSON values, all that the files depend on besides the passages and earlier stages.
    """
    record = directory / STAGE.format(name)
    if _read(record) != dict(facts):
        for path in directory.glob(pattern):
            path.unlink()
        write_json(record, facts)


@contextlib.contextmanager
def _building(directory: Path, recipe: Mapping[str, Any]) -> Iterator[Path]:
    """The directory to build in, which then takes the place of `directory`.

    It remains for the next build with an equal recipe when this process dies, and when the block raises after a stage
    has begun; otherwise it is deleted.
    """
    directory = directory.absolute()
    work = directory.with_name(f".{directory.name}{SUFFIX}")
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work / LOCK, os.O_CREAT | os.O_RDWR)
    with contextlib.closing(os.fdopen(descriptor, "rb")):
        _lock(descriptor, directory)
        if _read(work / RECIPE) != recipe:
            _clear(work)
            write_json(work / RECIPE, recipe)
        try:
            yield work
        except BaseException:
            if not any(work.glob(STAGE.format("*"))):
                shutil.rmtree(work)
            raise
        flush_directory(work)
        for path in work.glob(".*"):
            path.unlink()
        _replace(directory, work)


def _lock(descriptor: int, directory: Path) -> None:
    """Hold a lock until the descriptor is closed; on a file system without locks nothing is held."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise UserError(
                f"an index is built by one process at a time; another one is building {directory}"
            ) from None


def _clear(work: Path) -> None:
    """Delete all except the lock."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _replace(directory: Path, new: Path) -> None:
    """Rename `new` to `directory`, which may exist; if that fails, what was there stays."""
    old = directory.with_name(f".{directory.name}.old{SUFFIX}")
    shutil.rmtree(old, ignore_errors=True)
    if has_old := directory.exists():  # a directory cannot be renamed onto one that is not empty
        os.rename(directory, old)
    try:
        os.rename(new, directory)
    except OSError:
        if has_old:
            os.rename(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _read(path: Path) -> Any:
    """A JSON file; None where there is none, or half of one."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

"""The passages of an index, in memory-mapped files: opening them reads nothing, and a lookup reads one passage.

passages.jsonl          FlashRAG JSONL, one passage a line
passage_offsets.npy     int64 [P + 1]: line p is the bytes [offsets[p], offsets[p + 1])
passage_hashes.npy      uint64 [P]: hashes of the ids, ascending
passage_positions.npy   int64 [P]: position p of the passage whose id has the hash of the same row
"""

from __future__ import annotations

import hashlib
import json
import mmap
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from r3rag_jax.data.questions import passage_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.retrieval.arrays import open_array
from r3rag_jax.retrieval.fingerprint import corpus_fingerprint
from r3rag_jax.retrieval.manifest import AGAIN, check_files, read_manifest
from r3rag_jax.types import Passage

DATA_FILE = "passages.jsonl"
OFFSETS_FILE, HASHES_FILE, POSITIONS_FILE = "passage_offsets.npy", "passage_hashes.npy", "passage_positions.npy"
STORE_FILES = (DATA_FILE, OFFSETS_FILE, HASHES_FILE, POSITIONS_FILE)


class PassageStore(Mapping[str, Passage]):
    """P passages by id, or by position; iterates over the ids in order. May be read from several threads at once."""

    def __init__(self, directory: str | Path) -> None:
        """Open what `write_store` wrote.

        Raises:
            UserError: a file is missing or is not what was written; the message names it.
        """
        directory = Path(directory)
        self._offsets = _load(directory / OFFSETS_FILE, np.int64)
        self._hashes, self._positions = _load(directory / HASHES_FILE, np.uint64), _load(directory / POSITIONS_FILE)
        path = directory / DATA_FILE
        size = path.stat().st_size if path.is_file() else 0
        if not size:
            raise UserError(f"an index directory holds {DATA_FILE}; {path} is missing or empty")
        lengths = len(self._offsets) - 1, len(self._hashes), len(self._positions)
        if len(set(lengths)) != 1 or self._offsets[-1] != size:
            raise UserError(
                f"{path} must have the {self._offsets[-1]} bytes and {lengths[0]} passages that {OFFSETS_FILE} "
                f"describes; got {size} bytes and ids of {lengths[1]} and {lengths[2]}. Build the index again."
            )
        self._path = path
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._hashes)

    def __getitem__(self, id: str) -> Passage:
        hash = _hash(id)
        row = int(np.searchsorted(self._hashes, hash))
        while row < len(self) and self._hashes[row] == hash:  # more than one row where hashes of ids collide
            passage = self.at(self._positions[row])
            if passage.id == id:
                return passage
            row += 1
        raise KeyError(id)

    def __iter__(self) -> Iterator[str]:
        return (passage.id for passage in self.passages())

    def passages(self) -> Iterator[Passage]:
        """All passages in order, one in memory at a time."""
        return (self.at(position) for position in range(len(self)))

    def at(self, position: int | np.integer) -> Passage:
        """The passage at a position in [0, P).

        Raises:
            UserError: the bytes there are none, which digests of samples do not notice.
        """
        try:
            row = parse_json(self._data[self._offsets[position] : self._offsets[position + 1]])
            passage = Passage(row["id"], row["contents"])
            if not isinstance(passage.id, str) or not isinstance(passage.contents, str):
                raise TypeError("both are texts")
            return passage
        except (ValueError, LookupError, TypeError) as error:
            place = f"{self._path}, passage {int(position) + 1}"
            raise UserError(f"{place}: expected an object with id and contents: {error}. {AGAIN}") from error


def open_store(directory: str | Path) -> PassageStore:
    """The passages of an index directory, after their files were checked.

    Raises:
        UserError: there is no index, or a file is not the one that was written; the message names it.
    """
    directory = Path(directory)
    check_files(directory, read_manifest(directory), STORE_FILES)
    return PassageStore(directory)


def write_store(directory: Path, passages: Iterable[Passage]) -> str:
    """Write the files of a store into an existing directory; returns the fingerprint of the corpus.

    Holds one passage and 24 bytes per passage in memory.

    Raises:
        UserError: there are no passages, or two have the same id.
    """
    offsets, hashes = array("q", [0]), array("Q")
    with (directory / DATA_FILE).open("wb") as file:

        def written() -> Iterator[Passage]:
            for passage in passages:
                line = json.dumps(passage_to_dict(passage), ensure_ascii=False) + "\n"
                offsets.append(offsets[-1] + file.write(line.encode()))
                hashes.append(int(_hash(passage.id)))
                yield passage

        fingerprint = corpus_fingerprint(written())
    if not hashes:
        raise UserError("an index needs at least one passage; the corpus is empty")
    ids = np.frombuffer(hashes, np.uint64)
    order = np.argsort(ids, kind="stable")
    np.save(directory / OFFSETS_FILE, np.frombuffer(offsets, np.int64))
    np.save(directory / HASHES_FILE, ids[order])
    np.save(directory / POSITIONS_FILE, order.astype(np.int64))
    _check_unique(PassageStore(directory), ids[order], order)
    return fingerprint


def _check_unique(store: PassageStore, hashes: np.ndarray, positions: np.ndarray) -> None:
    """Raise a UserError if two passages have the same id; only those whose ids have equal hashes are read."""
    position_of: dict[str, int] = {}
    for row in np.flatnonzero(hashes[1:] == hashes[:-1]):
        for position in positions[row : row + 2].tolist():
            id = store.at(position).id
            if position_of.setdefault(id, position) != position:
                both = f"passages {position_of[id] + 1} and {position + 1} of the corpus"
                raise UserError(f"passage ids must be unique; {id!r} occurs twice: {both}")


def _hash(id: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little"))


def _load(path: Path, dtype: type = np.int64) -> np.ndarray:
    """A one-dimensional array, memory-mapped."""
    try:
        values = open_array(path, f". {AGAIN}")
    except FileNotFoundError as error:
        raise UserError(f"an index directory holds {path.name}; {path} is missing") from error
    if values.ndim != 1 or values.dtype != dtype:
        raise UserError(f"{path} must be {np.dtype(dtype)} [P]; got {values.dtype} {list(values.shape)}")
    return values

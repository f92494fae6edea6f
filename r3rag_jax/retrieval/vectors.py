"""The vectors of an index: arrays in numpy's format, in shards that are memory-mapped.

vectors-00000.npy, vectors-00001.npy, …   float16 or float32 [n, D], one row per passage in their order; a row has
                                          L2 norm 1, or 0 where the text has no known feature
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.arrays import open_array
from r3rag_jax.retrieval.manifest import AGAIN
from r3rag_jax.run.files import open_atomic_binary

PATTERN = "vectors-*.npy"
DTYPES = (np.dtype(np.float16), np.dtype(np.float32))


class VectorShards:
    """P vectors of size D; opening them reads nothing, and rows are read when they are asked for.

    Iterating yields the shards in order, each [n, D]. May be read from several threads at once.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        """
        Args:
            shards: arrays [n, D], n > 0, of one dtype, in the order of the passages.

        Raises:
            ValueError: there is none, or they differ in D or dtype.
        """
        if not shards or any(shard.ndim != 2 or not len(shard) for shard in shards):
            raise ValueError(f"vectors are arrays [n, D], at least one; got {[shard.shape for shard in shards]}")
        kinds = {(shard.shape[1], shard.dtype) for shard in shards}
        if len(kinds) > 1 or shards[0].dtype not in DTYPES:
            found = ", ".join(sorted(f"{dtype} [n, {dim}]" for dim, dtype in kinds))
            raise ValueError(f"the shards of an index are all float16 or all float32, of one size; got {found}")
        self._shards = list(shards)
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])  # shard s holds rows [starts[s], starts[s+1])

    @classmethod
    def open(cls, directory: Path) -> VectorShards:
        """Memory-map the shards of an index directory.

        Raises:
            UserError: there are none, or a file is not a shard; the message names it.
        """
        shards = []
        paths = sorted(directory.glob(PATTERN))
        for number in range(len(paths)):
            path = directory / shard_name(number)
            try:
                shards.append(open_array(path, f". {AGAIN}"))
            except FileNotFoundError as error:
                raise UserError(f"an index directory holds {path.name}; {path} is missing. {AGAIN}") from error
        if not shards:
            raise UserError(f"an index of vectors holds {shard_name(0)}; {directory / shard_name(0)} is missing")
        try:
            return cls(shards)
        except ValueError as error:
            raise UserError(f"{directory / PATTERN}: {error}. {AGAIN}") from error

    @property
    def shape(self) -> tuple[int, int]:
        """(P, D)."""
        return int(self._starts[-1]), self._shards[0].shape[1]

    @property
    def dtype(self) -> np.dtype:
        """float16 or float32."""
        return self._shards[0].dtype

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._shards)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as stored, [stop - start, D]: a view of one shard, or a copy from several.

        Raises:
            IndexError: unless 0 <= start <= stop <= P.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows must be in [0, {len(self)}); got [{start}, {stop})")
        first = min(int(np.searchsorted(self._starts, start, "right")) - 1, len(self._shards) - 1)
        last = max(first, int(np.searchsorted(self._starts, stop, "left")) - 1)
        parts = [
            self._shards[s][max(start - self._starts[s], 0) : stop - self._starts[s]] for s in range(first, last + 1)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def blocks(self, num_rows: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(position of the first row, rows as stored) of at most `num_rows` rows at a time, in order."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, num_rows):
            yield first, self.rows(first, min(first + num_rows, stop))

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The rows at positions [N] in [0, P), as float32 [N, D]."""
        out_ND = np.empty((len(positions), self.shape[1]), np.float32)
        shards = np.searchsorted(self._starts, positions, "right") - 1
        for s in np.unique(shards):
            rows = np.flatnonzero(shards == s)
            out_ND[rows] = self._shards[s][positions[rows] - self._starts[s]]
        return out_ND


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"vectors-{number:05d}.npy"


def write_shard(directory: Path, number: int, vectors_ND: np.ndarray) -> None:
    """Write a shard; the file appears whole or not at all."""
    with open_atomic_binary(directory / shard_name(number)) as file:
        np.lib.format.write_array(file, vectors_ND, allow_pickle=False)

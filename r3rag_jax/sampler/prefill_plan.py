"""Packs uncached tokens into prefill calls of a few fixed shapes, so that few programs are compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from r3rag_jax.parallel.target import Target


class PrefillShapes(NamedTuple):
    """Sizes of the compiled prefill calls, in tokens."""

    lengths: tuple[int, ...]  # chunk lengths per row, ascending
    totals: tuple[int, ...]  # maximum tokens per device and call, padding included


CPU_SHAPES = PrefillShapes(lengths=(32, 48, 64, 96, 128), totals=(128, 512))
ACCELERATOR_SHAPES = PrefillShapes(lengths=(32, 128, 512), totals=(512, 4096))


class Missing(NamedTuple):
    """A row whose cache lacks the keys and values of ids[start : len(ids) - 1]."""

    row: int
    ids: Sequence[int]
    start: int

    @property
    def num_tokens(self) -> int:
        return len(self.ids) - 1 - self.start


class Chunk(NamedTuple):
    """The arguments of a prefill call: W devices, R rows per device, C tokens per row."""

    rows: np.ndarray  # int32 [W, R], relative to the device's first row; out-of-range rows are not written
    tokens: np.ndarray  # int32 [W, R, C], right-padded
    starts: np.ndarray  # int32 [W, R], position of the first token


class PrefillPlan:
    """Cuts uncached tokens into chunks; every device prefills its own rows."""

    def __init__(self, target: Target, slots: int, ways: int):
        """`ways`: number of devices that the `slots` rows are split over."""
        self._ways, self._rows_per_device = ways, slots // ways
        self._shapes = CPU_SHAPES if target.is_cpu else ACCELERATOR_SHAPES

    def empty_chunks(self) -> list[Chunk]:
        """One chunk of every shape that `next_chunk` can return, with out-of-range rows only."""
        return [self.empty_chunk(size, length) for length in self._shapes.lengths for size in self._num_rows(length)]

    def next_chunk(self, missing: Sequence[Missing]) -> tuple[Chunk, list[Missing], int]:
        """Pack the rows that lack the most tokens; returns the chunk, what is missing after it, and its token count."""
        missing = sorted(missing, key=lambda one: -one.num_tokens)
        longest, lengths = missing[0].num_tokens, self._shapes.lengths
        length = next((length for length in lengths if length >= longest), lengths[-1])
        most = max(Counter(self.device_of(one.row) for one in missing).values())
        sizes = self._num_rows(length)
        size = next((size for size in sizes if size >= most), sizes[-1])
        chunk = self.empty_chunk(size, length)
        used, left, num_tokens = [0] * self._ways, [], 0
        for one in missing:
            device, row = divmod(one.row, self._rows_per_device)
            i, end = used[device], min(one.start + length, len(one.ids) - 1)
            if i == size:
                left.append(one)
                continue
            chunk.rows[device, i], chunk.starts[device, i] = row, one.start
            chunk.tokens[device, i, : end - one.start] = one.ids[one.start : end]
            used[device] += 1
            num_tokens += end - one.start
            if end < len(one.ids) - 1:
                left.append(one._replace(start=end))
        return chunk, left, num_tokens

    def device_of(self, row: int) -> int:
        """The index, among those that the rows are split over, of the device that has a row."""
        return row // self._rows_per_device

    def empty_copies(self) -> tuple[np.ndarray, np.ndarray]:
        """Sources and targets of `decode.copy` that copy nothing, int32 [W, rows per device]."""
        shape = self._ways, self._rows_per_device
        return np.zeros(shape, np.int32), np.full(shape, self._rows_per_device, np.int32)

    def copies(self, pairs: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """The arguments of `decode.copy` for (source, target) pairs of rows; both of a pair are on one device."""
        sources, targets = self.empty_copies()
        used = [0] * self._ways
        for source, target in pairs:
            device = self.device_of(target)
            sources[device, used[device]] = source % self._rows_per_device
            targets[device, used[device]] = target % self._rows_per_device
            used[device] += 1
        return sources, targets

    def empty_chunk(self, size: int, length: int) -> Chunk:
        """A chunk with `size` out-of-range rows per device and `length` tokens per row."""
        rows = np.tile(self._rows_per_device + np.arange(size, dtype=np.int32), (self._ways, 1))
        return Chunk(rows, np.zeros((*rows.shape, length), np.int32), np.zeros(rows.shape, np.int32))

    def _num_rows(self, length: int) -> list[int]:
        """The possible numbers of rows per device in a call with this chunk length, ascending."""
        return sorted({min(self._rows_per_device, total // length) for total in self._shapes.totals})

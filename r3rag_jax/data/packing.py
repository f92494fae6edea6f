"""Packing: which sequences share a row of fixed length, and what a packed row holds.

The plan of rows is made from lengths alone, before any sequence is read, so that the number of steps is known, and a
position in it is one number that does not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from r3rag_jax.errors import UserError

# Samples packed together: enough for first-fit-decreasing to fill rows, few enough that the neighbours of a sample in
# its row change from epoch to epoch.
PACK_WINDOW = 2048


class PackedSequence(Protocol):
    """What is packed into a row: `SFTSample` or `types.Sample`."""

    @property
    def positions(self) -> np.ndarray | None: ...

    @property
    def branch_ids(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...


def first_fit_decreasing(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Pack items into rows of `row_length`: longest first, each into the first row with room.

    At most 11/9 of the fewest rows possible, plus one (Johnson 1973).

    Args:
        lengths: [num_items], in tokens.
        row_length: tokens of a row.

    Returns:
        For each row the indices of its items; items of equal length keep their order.

    Raises:
        UserError: an item is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and lengths.max() > row_length:
        too_long = lengths[lengths > row_length]
        raise UserError(
            f"every sample must fit a row of row_length={row_length} tokens; {len(too_long)} of "
            f"{len(lengths)} do not, the longest has {too_long.max()}"
        )
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)  # of row r, for r < len(rows)
    for item in np.argsort(-lengths, kind="stable"):
        has_room = room[: len(rows)] >= lengths[item]
        row = int(has_room.argmax()) if has_room.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = row_length
        rows[row].append(int(item))
        room[row] -= lengths[item]
    return rows


def join(parts: Sequence[np.ndarray], row_length: int, dtype: Any, fill: float = 0) -> np.ndarray:
    """Concatenate arrays into a row [row_length], padded with `fill`."""
    row = np.full(row_length, fill, dtype)
    if parts:
        row[: sum(map(len, parts))] = np.concatenate(parts)
    return row


def row_layout(samples: Sequence[PackedSequence], row_length: int, *, has_branches: bool) -> dict[str, np.ndarray]:
    """Positions, segment ids and, with branches, branch ids of a packed row, each int32 [row_length].

    Sequences of 2 and 3 tokens in a row of 7:  positions 0 1 0 1 2 0 0,  segment ids 1 1 2 2 2 0 0.

    Raises:
        ValueError: a sequence has branch ids and `has_branches` is False, or the reverse.
    """
    if any((sample.branch_ids is not None) != has_branches for sample in samples):
        raise ValueError("all sequences or none of them must have branch_ids; got some of each")
    positions = [np.arange(len(s)) if s.positions is None else s.positions for s in samples]
    segments = [np.full(len(sample), number) for number, sample in enumerate(samples, 1)]
    layout = {"positions": positions, "segment_ids": segments}
    if has_branches:
        layout["branch_ids"] = [sample.branch_ids for sample in samples]  # type: ignore[misc]  # checked above
    return {name: join(parts, row_length, np.int32) for name, parts in layout.items()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which samples make up each row, for all epochs; the same on every process."""

    rows: tuple[tuple[int, ...], ...]
    num_samples: int  # in an epoch, without dropped ones
    num_dropped: int  # in an epoch: samples longer than a row
    fill: float  # fraction of the rows' tokens that is not padding

    @property
    def fingerprint(self) -> int:
        """Checksum of the rows: a resumed run has the same only with the same lengths, seed and row length."""
        flat = [i for row in self.rows for i in (*row, -1)]
        return zlib.crc32(np.asarray(flat, np.int64).tobytes())


def plan_rows(
    lengths: Sequence[int] | np.ndarray,
    *,
    row_length: int,
    epochs: int,
    seed: int,
    too_long: Literal["error", "drop"] = "error",
) -> Plan:
    """Shuffle and pack every epoch, deterministically in `seed`; an epoch holds every kept sample once.

    Args:
        lengths: [num_samples], in tokens.
        row_length: tokens of a row.
        too_long: whether a sample longer than a row is an error, or is dropped and counted.

    Raises:
        UserError: there is no sample to train on, or, with too_long="error", one is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    kept = np.flatnonzero(lengths <= row_length) if too_long == "drop" else np.arange(len(lengths))
    if not len(kept):
        raise UserError(
            f"the cold start needs samples of at most row_length={row_length} tokens; got none among {len(lengths)}"
        )
    rows: list[tuple[int, ...]] = []
    for epoch in range(epochs):
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(kept)
        packed = []
        for start in range(0, len(order), PACK_WINDOW):
            window = order[start : start + PACK_WINDOW]
            for row in first_fit_decreasing(lengths[window], row_length):
                packed.append(tuple(window[row].tolist()))
        # Packing opens the rows of a window longest sample first; training must not depend on that order.
        rows.extend(packed[i] for i in rng.permutation(len(packed)))
    return Plan(
        rows=tuple(rows),
        num_samples=len(kept),
        num_dropped=len(lengths) - len(kept),
        fill=float(lengths[kept].sum()) * epochs / (len(rows) * row_length),
    )

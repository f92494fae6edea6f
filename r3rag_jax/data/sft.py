"""The cold start's input pipeline: tokenised samples -> packed rows -> sharded batches, with grain.

Rows are *planned* from the samples' lengths before anything is read. grain's own packing
(FirstFitPackIterDataset) was left out on purpose: it packs each process's stream as it comes, so
the number of steps is unknown up front and a saved position is bound to the number of processes.
With a plan, grain has a random-access source of rows; it does the sharding, the batching and the
reading ahead, and a position is one number that any topology can resume from.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from r3rag_jax.errors import UserError
from r3rag_jax.types import SFTBatch

# Samples packed together: enough for first-fit-decreasing to fill rows, few enough that the
# neighbours of a sample in its row change from epoch to epoch.
PACK_WINDOW = 2048


@dataclasses.dataclass(frozen=True)
class SFTSample:
    """One tokenised sequence.

    Fields, all of length L:
        ids: int32.
        loss_mask: bool, True where the model is to learn the token; never for the first one,
            which nothing predicts.
        positions, branch_ids: as of `types.Sample`; all of a source's samples have branches, or none.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray | None = None
    branch_ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.loss_mask) or not len(self.ids):
            raise ValueError(
                f"ids and loss_mask must have one length, at least 1; got {len(self.ids)} and {len(self.loss_mask)}"
            )
        if self.loss_mask[0]:
            raise ValueError("loss_mask must be False for the first token: nothing predicts it")

    def __len__(self) -> int:
        return len(self.ids)


class Sequential(Protocol):
    """What lies in a row: `SFTSample`, `types.Sample`."""

    @property
    def positions(self) -> np.ndarray | None: ...

    @property
    def branch_ids(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...


class SampleSource(Protocol):
    """Random access to samples: a list, or a `grain.MapDataset` that tokenises as it reads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> SFTSample: ...


def first_fit_decreasing(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Packs items into rows of `row_length`: longest first, each into the first row with room.

    At most 11/9 of the fewest rows possible, plus one (Johnson 1973). Written out because the
    plan is needed on lengths alone, and the whole algorithm is one loop.

    Returns:
        For each row the indices of its items; ties keep the order they came in.
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
    """Puts arrays one after the other into a row [row_length], `fill` behind them."""
    row = np.full(row_length, fill, dtype)
    if parts:
        row[: sum(map(len, parts))] = np.concatenate(parts)
    return row


def row_layout(samples: Sequence[Sequential], row_length: int, *, has_branches: bool) -> dict[str, np.ndarray]:
    """Positions, segment ids and, of trees, branch ids, int32 [row_length], of a row of sequences.

    Lengths 2 3 in a row of 7:  positions 0 1 0 1 2 0 0,  segment ids 1 1 2 2 2 0 0.

    Raises:
        ValueError: some of a source's sequences have branches and others have none.
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
    num_samples: int  # per epoch, without dropped ones
    num_dropped: int  # per epoch, longer than a row
    fill: float  # share of the rows' tokens that is not padding, without empty rows at the end

    @property
    def fingerprint(self) -> int:
        """Tells a resumed run that data, seed or row length have changed."""
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
    """Shuffles and packs every epoch, deterministically in `seed`; every kept sample once an epoch.

    Args:
        lengths: [num_samples], in tokens.
        too_long: whether a sample longer than a row is an error or dropped and counted.

    Raises:
        UserError: no sample to train on, or one that does not fit with too_long="error".
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
        # A window opens its rows longest sample first; the learner must not see that order.
        rows.extend(packed[i] for i in rng.permutation(len(packed)))
    return Plan(
        rows=tuple(rows),
        num_samples=len(kept),
        num_dropped=len(lengths) - len(kept),
        fill=float(lengths[kept].sum()) * epochs / (len(rows) * row_length),
    )


class _RowSource:
    """Random access to the plan's rows from `start` on, as dicts of [L] arrays."""

    def __init__(self, samples: SampleSource, plan: Plan, row_length: int, batch_rows: int, start: int) -> None:
        self._has_branches = samples[0].branch_ids is not None
        self._samples, self._plan, self._row_length, self._start = samples, plan, row_length, start
        self._len = -(-(len(plan.rows) - start) // batch_rows) * batch_rows

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        row = self._start + int(index)
        # Rows past the plan are empty: they fill up the last batch, and train nothing.
        members = self._plan.rows[row] if row < len(self._plan.rows) else ()
        samples = [self._samples[i] for i in members]
        return {
            "tokens": join([sample.ids for sample in samples], self._row_length, np.int32),
            **row_layout(samples, self._row_length, has_branches=self._has_branches),
            "loss_mask": join([sample.loss_mask for sample in samples], self._row_length, np.bool_),
        }


class SFTBatches(Iterator[SFTBatch]):
    """All batches of the cold start in order, this process's share; a position can be resumed.

    Every global batch is `batch_rows` consecutive rows of the plan; process p takes rows
    p, p + process_count, … of it. Nothing is read twice or left out, whatever the topology.

    Attributes:
        plan: what is read, with its counts and fill.
        num_steps: global batches in all epochs.
        step: global batches handed out.
    """

    def __init__(
        self,
        samples: SampleSource,
        *,
        row_length: int,
        batch_rows: int,
        epochs: int,
        seed: int,
        too_long: Literal["error", "drop"] = "error",
        process_index: int = 0,
        process_count: int = 1,
        num_threads: int = 2,
    ) -> None:
        """Reads every sample once for its length, and plans.

        Args:
            samples: what to learn, the same on every process; read by `num_threads` at a time.
            row_length: tokens of a packed row.
            batch_rows: rows of a global batch, over all processes.
            num_threads: readers ahead of the training loop.

        Raises:
            UserError: as `plan_rows`; or rows that do not divide by the processes.
        """
        if batch_rows < 1 or batch_rows % process_count:
            raise UserError(
                f"sft.batch_rows must be a positive multiple of {process_count} processes; got {batch_rows}"
            )
        if epochs < 1:
            raise UserError(f"sft.epochs must be at least 1; got {epochs}")
        self._samples, self._row_length, self._batch_rows = samples, row_length, batch_rows
        self._shard = slice(process_index, None, process_count)
        self._local_rows = batch_rows // process_count
        self._num_threads = num_threads
        lengths = [len(samples[i]) for i in range(len(samples))]
        self.plan = plan_rows(lengths, row_length=row_length, epochs=epochs, seed=seed, too_long=too_long)
        self.num_steps = -(-len(self.plan.rows) // batch_rows)
        self._seek(0)

    def _seek(self, row: int) -> None:
        """Continues with global row `row` of the plan."""
        import grain  # half a second that only the cold start pays

        self._next_row = row
        source = _RowSource(self._samples, self.plan, self._row_length, self._batch_rows, row)
        dataset = grain.MapDataset.source(source)[self._shard].batch(self._local_rows)
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=2 * self._num_threads)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __next__(self) -> SFTBatch:
        batch = SFTBatch(**({"branch_ids": None} | next(self._iterator)))
        self._next_row = min(self._next_row + self._batch_rows, len(self.plan.rows))
        return batch

    @property
    def step(self) -> int:
        return -(-self._next_row // self._batch_rows)

    @property
    def num_examples(self) -> int:
        """Samples handed out so far, over all processes and epochs."""
        return sum(map(len, self.plan.rows[: self._next_row]))

    def get_state(self) -> dict[str, int]:
        """The position, the same on every process: JSON-able, independent of the topology."""
        return {
            "rows": self._next_row,
            "examples": self.num_examples,
            "plan": self.plan.fingerprint,
        }

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues right behind a saved position; UserError if it was saved over another plan."""
        if state["plan"] != self.plan.fingerprint:
            raise UserError(
                "the cold start can resume only with the same samples, row_length, epochs and "
                f"seed; the position after {state['examples']} examples was saved over other ones"
            )
        self._seek(state["rows"])

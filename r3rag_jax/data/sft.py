"""Input pipeline of the cold start: tokenised samples -> packed rows -> batches, with grain.

grain gets a random-access source of this process's rows of a `packing.Plan`, batches them and reads ahead. grain's own
packing (FirstFitPackIterDataset) is not used: it packs the stream of each process as it comes,
so the number of steps is unknown beforehand, and a saved position is bound to the number of processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from r3rag_jax.data.packing import Plan, join, plan_rows, row_layout
from r3rag_jax.errors import UserError
from r3rag_jax.types import SFTBatch


@dataclasses.dataclass(frozen=True)
class SFTSample:
    """One tokenised sequence.

    Fields, all of length L:
        ids: int32.
        loss_mask: bool, True where the model learns the token; False for the first one, which nothing predicts.
        positions, branch_ids: as in `types.Sample`; either all samples of a source have branch ids, or none.
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


class SampleSource(Protocol):
    """Random access to samples: a list, or a `grain.MapDataset` that tokenises as it reads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> SFTSample: ...


class FlatSamples(Sequence[SFTSample]):
    """The samples of groups, e.g. of trajectories, of which each is made whenever one of its samples is asked for.

    Attributes:
        lengths: int64 [num_samples], in tokens.
    """

    def __init__(self, groups: Sequence[Sequence[SFTSample]]) -> None:
        """Make every group once, for its lengths."""
        lengths = [[len(sample) for sample in group] for group in groups]
        self._groups, self._ends = groups, np.cumsum([len(group) for group in lengths])
        self.lengths = np.asarray([length for group in lengths for length in group], np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        group = int(np.searchsorted(self._ends, index, side="right"))
        return self._groups[group][index - int(self._ends[group])]  # counted from the group's end: negative


class _RowSource:
    """Random access to rows of the plan from row `start` on, as dicts of [L] arrays, padded to whole batches.

    Item i is row `rows[i % len(rows)]` of batch `i // len(rows)`.
    """

    def __init__(
        self, samples: SampleSource, plan: Plan, row_length: int, batch_rows: int, rows: Sequence[int], start: int
    ) -> None:
        self._has_branches = samples[0].branch_ids is not None
        self._samples, self._plan, self._row_length = samples, plan, row_length
        self._batch_rows, self._rows, self._start = batch_rows, rows, start
        self._len = -(-(len(plan.rows) - start) // batch_rows) * len(rows)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        batch, place = divmod(int(index), len(self._rows))
        row = self._start + batch * self._batch_rows + self._rows[place]
        # Rows past the end of the plan pad the last batch; they are empty.
        members = self._plan.rows[row] if row < len(self._plan.rows) else ()
        samples = [self._samples[i] for i in members]
        return {
            "tokens": join([sample.ids for sample in samples], self._row_length, np.int32),
            **row_layout(samples, self._row_length, has_branches=self._has_branches),
            "loss_mask": join([sample.loss_mask for sample in samples], self._row_length, np.bool_),
        }


class SFTBatches(Iterator[SFTBatch]):
    """Iterates over this process's rows of every batch of the cold start; a position can be saved and resumed.

    A global batch is `batch_rows` consecutive rows of the plan, whatever the number of processes; each process makes
    those that its devices hold. So a run that is resumed on another number of processes has the same next batch.

    Attributes:
        plan: the rows of all epochs.
        rows: those of a global batch that this process makes.
        num_steps: global batches in all epochs.
        step: global batches already returned.
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
        rows: Sequence[int] | None = None,
        num_threads: int = 2,
    ) -> None:
        """Read the length of every sample, and plan the rows.

        Args:
            samples: the same on every process; read by `num_threads` threads at a time. Their `lengths`, if they have
                any, save reading them all.
            row_length: tokens of a packed row.
            batch_rows: rows of a global batch, over all processes.
            too_long: as in `plan_rows`.
            rows: the rows of a global batch, from 0, that this process makes; None: all.
            num_threads: threads that read ahead of the training loop.

        Raises:
            UserError: as `plan_rows`; or a number is too small.
        """
        if batch_rows < 1:
            raise UserError(f"sft.batch_rows must be at least 1; got {batch_rows}")
        if epochs < 1:
            raise UserError(f"sft.epochs must be at least 1; got {epochs}")
        self._samples, self._row_length, self._batch_rows = samples, row_length, batch_rows
        self.rows = list(range(batch_rows) if rows is None else rows)
        self._num_threads = num_threads
        lengths = getattr(samples, "lengths", None)
        self._lengths = np.asarray([len(samples[i]) for i in range(len(samples))] if lengths is None else lengths)
        self.plan = plan_rows(self._lengths, row_length=row_length, epochs=epochs, seed=seed, too_long=too_long)
        self.num_steps = -(-len(self.plan.rows) // batch_rows)
        self._seek(0)

    def _seek(self, row: int) -> None:
        """Make row `row` of the plan the next one."""
        import grain  # takes half a second to import; only the cold start needs it

        self._next_row = row
        source = self._row_source(row, self.rows)
        dataset = grain.MapDataset.source(source).batch(len(self.rows))
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=2 * self._num_threads)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def _row_source(self, start: int, rows: Sequence[int]) -> _RowSource:
        return _RowSource(self._samples, self.plan, self._row_length, self._batch_rows, rows, start)

    def __next__(self) -> SFTBatch:
        """This process's rows of the next batch, in the order of `rows`."""
        batch = SFTBatch(**({"branch_ids": None} | next(self._iterator)))
        self._next_row = min(self._next_row + self._batch_rows, len(self.plan.rows))
        return batch

    @property
    def step(self) -> int:
        return -(-self._next_row // self._batch_rows)

    def num_tokens(self, step: int) -> int:
        """Tokens of a global batch without padding."""
        members = self._members(step)
        return int(self._lengths[members].sum()) if members else 0

    def whole(self, step: int) -> SFTBatch:
        """All rows of a global batch, read anew."""
        source = self._row_source(step * self._batch_rows, range(self._batch_rows))
        rows = [source[row] for row in range(self._batch_rows)]
        fields: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return SFTBatch(**({"branch_ids": None} | fields))

    def _members(self, step: int) -> list[int]:
        rows = self.plan.rows[step * self._batch_rows : (step + 1) * self._batch_rows]
        return [index for row in rows for index in row]

    @property
    def num_examples(self) -> int:
        """Samples already returned, over all processes and epochs."""
        return sum(map(len, self.plan.rows[: self._next_row]))

    def get_state(self) -> dict[str, int]:
        """The position as JSON values: equal on every process, and independent of the number of processes."""
        return {"rows": self._next_row, "examples": self.num_examples, "plan": self.plan.fingerprint}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continue after a saved position.

        Raises:
            UserError: the position belongs to another plan.
        """
        if state["plan"] != self.plan.fingerprint:
            raise UserError(
                "the cold start can resume only with the same samples, row_length, epochs and "
                f"seed; the position after {state['examples']} examples was saved over other ones"
            )
        self._seek(state["rows"])

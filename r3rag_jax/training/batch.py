"""Trajectories -> batches: packs samples into rows, and says where in them each trajectory's tokens lie.

Arrays stay on the host (numpy); the caller puts them on its mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from r3rag_jax.config import RLConfig
from r3rag_jax.data.packing import first_fit_decreasing, join, row_layout
from r3rag_jax.rl.algorithms import ALGORITHMS
from r3rag_jax.training.groups import number_groups
from r3rag_jax.types import Sample, TrainBatch, Trajectory, TrajectoryTable


def pack(
    samples: Sequence[Sample], *, row_length: int, num_rows: int | None = None, has_branches: bool = False
) -> tuple[TrainBatch, np.ndarray]:
    """Pack samples, each whole, into rows of `row_length` tokens by first-fit-decreasing.

    Args:
        num_rows: rows of the batch, empty ones included; default: as many as are needed.
        has_branches: whether the samples are trees (`prefix_tree.py`).

    Returns:
        The batch, numpy arrays [num_rows, row_length], and for each sample the index of its first token in the
        flattened batch, int [num_samples].

    Raises:
        UserError: a sample is longer than a row.
        ValueError: a sample cannot be trained on, or more rows are needed than `num_rows`.
    """
    for sample in samples:
        _check_sample(sample)
    rows = first_fit_decreasing([len(sample) for sample in samples], row_length)
    if num_rows is not None:
        if len(rows) > num_rows:
            raise ValueError(f"the samples must fit num_rows={num_rows} rows; need {len(rows)}")
        rows += [[]] * (num_rows - len(rows))
    starts = np.zeros(len(samples), int)
    for number, row in enumerate(rows):
        lengths = [len(samples[i]) for i in row]
        starts[row] = number * row_length + np.cumsum([0, *lengths[:-1]])[: len(row)]

    def stack(name: str, dtype: type, fill: float = 0) -> Any:
        cells = [join([getattr(samples[i], name) for i in row], row_length, dtype, fill) for row in rows]
        return np.stack(cells) if cells else np.zeros((0, row_length), dtype)

    layouts = [row_layout([samples[i] for i in row], row_length, has_branches=has_branches) for row in rows]

    def layout(name: str) -> Any:
        return np.asarray([one[name] for one in layouts], np.int32).reshape(len(rows), row_length)

    temperatures = np.ones(len(rows) * row_length, np.float32)
    for sample, start in zip(samples, starts, strict=True):
        temperatures[start : start + len(sample)] = sample.temperature or 1.0  # greedy samples are trained at 1
    batch = TrainBatch(
        tokens=stack("ids", np.int32),
        positions=layout("positions"),
        segment_ids=layout("segment_ids"),
        branch_ids=layout("branch_ids") if has_branches else None,
        loss_mask=stack("loss_mask", np.bool_),
        behaviour_logprobs=stack("behaviour_logprobs", np.float32),
        temperature=temperatures.reshape(len(rows), row_length),  # type: ignore[arg-type]  # numpy until it is put
    )
    return batch, starts


def _check_sample(sample: Sample) -> None:
    if len(sample) and sample.loss_mask[0]:
        raise ValueError("a sample must open with its prompt: nothing predicts its first token")
    if not sample.has_logprobs:
        raise ValueError("a sample must hold the log-probabilities of its sampled tokens; got one without")


def minibatches(
    samples: Sequence[Sample], *, row_length: int, batch_rows: int, rng: np.random.Generator
) -> tuple[list[TrainBatch], np.ndarray]:
    """Pack samples, shuffle the rows and cut them into batches.

    Each sample is in exactly one batch. The rows are dealt out evenly and empty rows fill up the batches: every batch
    makes a whole update, and one of a single row would be little but noise.

    Returns:
        The batches, numpy arrays [batch_rows, row_length], and for each sample the index of its first token among the
        tokens of all batches, one batch after the other, int [num_samples].

    Raises:
        UserError, ValueError: as `pack`.
    """
    has_branches = any(sample.branch_ids is not None for sample in samples)
    packed, starts = pack(samples, row_length=row_length, has_branches=has_branches)
    num_rows = len(packed.tokens)
    if not num_rows:
        return [], starts
    row_sets = np.array_split(rng.permutation(num_rows), -(-num_rows // batch_rows))
    batches, new_rows = [], np.zeros(num_rows, int)  # old row -> row among those of all batches
    for number, rows in enumerate(row_sets):
        new_rows[rows] = number * batch_rows + np.arange(len(rows))
        num_empty = batch_rows - len(rows)
        empty, _ = pack([], row_length=row_length, num_rows=num_empty, has_branches=has_branches)
        batches.append(jax.tree.map(lambda x, y, rows=rows: np.concatenate([x[rows], y]), packed, empty))
    return batches, new_rows[starts // row_length] * row_length + starts % row_length


def tabulate(
    trajectories: Sequence[Trajectory],
    rewards: Sequence[np.ndarray],
    starts: Sequence[int] | np.ndarray,
    groups: np.ndarray,
    *,
    num_tokens: int,
) -> TrajectoryTable:
    """The policy's tokens of an iteration by trajectory, numpy arrays.

    Rows and width are rounded up to a power of two, so that few shapes are compiled.

        batches  samples of trajectories  1 1 . 0 0 | 1 . . 0 .      indices     3 4 8
                 their step_ids           0 0 . 0 0 | 1 . . 2 .  ->              0 1 5
                                                                     step_ids    0 0 2
                                                                                 0 0 1

    Args:
        trajectories: N of them, the first ones those whose samples are in batches.
        rewards: for each trajectory the rewards [K] of its K steps; one sits on the last token of its step.
        starts: for each sample in a batch, trajectory by trajectory, the index of its first token.
        groups: int [N], for each trajectory the number of its question, below N.
        num_tokens: tokens of all batches.

    Raises:
        ValueError: a reward is missing, not finite, or not carried by exactly one sample.
    """
    rows = [_policy_tokens(*pair) for pair in zip(trajectories, rewards, strict=True)]
    num_rows = _next_power_of_two(len(groups))
    width = _next_power_of_two(max((len(step_ids) for _, step_ids, _ in rows), default=1))
    mask = np.zeros((num_rows, width), bool)
    table: dict[str, np.ndarray] = {
        "indices": np.full(mask.shape, num_tokens, np.int32),
        "rewards": np.zeros(mask.shape, np.float32),
        "step_ids": np.zeros(mask.shape, np.int32),
    }
    remaining_starts = iter(starts)
    for row, (offsets, step_ids, rewards_T) in enumerate(rows):
        length = len(step_ids)
        mask[row, :length] = True
        table["step_ids"][row, :length], table["rewards"][row, :length] = step_ids, rewards_T
        placed = [(next(remaining_starts, None), of_sample) for of_sample in offsets]
        indices = [np.full(len(x), num_tokens) if start is None else start + x for start, x in placed]
        table["indices"][row, :length] = np.concatenate([*indices, np.arange(0)])
    numbers = np.zeros(num_rows, np.int32)
    numbers[: len(groups)] = groups
    return TrajectoryTable(**table, mask=mask, groups=numbers)  # type: ignore[arg-type]  # numpy until they are put


def _policy_tokens(trajectory: Trajectory, rewards_K: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The tokens that the policy wrote: their offsets in each sample, and over all samples their steps and rewards.

    step_ids -1 0 0 -1 1, rewards 0.5 2.0  ->  offsets [1 2 4], steps 0 0 1, rewards 0 0.5 2.0
    """
    _check_rewards(trajectory, rewards_K)
    offsets = [np.flatnonzero(sample.loss_mask) for sample in trajectory.samples]
    step_ids = _concatenate(sample.step_ids[sample.loss_mask] for sample in trajectory.samples)
    if (np.diff(step_ids) < 0).any():
        raise ValueError(f"steps must come in their order; those of question {trajectory.question.id!r} do not")
    is_last = np.append(step_ids[1:] != step_ids[:-1], True)[: len(step_ids)]
    return offsets, step_ids, np.where(is_last, np.asarray(rewards_K, np.float32)[step_ids], np.float32(0))


def _check_rewards(trajectory: Trajectory, rewards_K: np.ndarray) -> None:
    """Each step must have a finite reward, and each reward exactly one sample to sit in."""
    if len(rewards_K) != len(trajectory.steps):
        raise ValueError(f"each of the {len(trajectory.steps)} steps must have a reward; got {len(rewards_K)}")
    if not np.isfinite(rewards_K).all():
        raise ValueError(f"rewards must be finite; got {rewards_K}")
    step_ids = _concatenate(np.unique(sample.step_ids[sample.loss_mask]) for sample in trajectory.samples)
    if step_ids.max(initial=0) >= max(1, len(rewards_K)):
        raise ValueError(f"step {step_ids.max()} must have a reward; got {len(rewards_K)} rewards")
    counts = np.bincount(step_ids, minlength=len(rewards_K))
    wrong = np.flatnonzero((counts > 1) | ((counts == 0) & (np.asarray(rewards_K) != 0)))
    if len(wrong):
        raise ValueError(
            f"the reward of a step must sit in exactly one sample; {counts[wrong[0]]} samples of "
            f"question {trajectory.question.id!r} have policy tokens of step {wrong[0]}"
        )


def _concatenate(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.arange(0), *arrays])


def _next_power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class IterationBatches:
    """The trajectories of an iteration as its updates read them, numpy arrays."""

    batches: list[TrainBatch]
    table: TrajectoryTable
    order: list[int]  # for each update the number of its batch
    metrics: dict[str, float]  # fill, learnt_from, equal_groups
    rows: list[int]  # for each row of the table the number of its trajectory


def pack_iteration(
    trajectories: Sequence[Trajectory],
    rewards: Sequence[np.ndarray],
    zero_variance: np.ndarray,
    config: RLConfig,
    rng: np.random.Generator,
) -> IterationBatches:
    """Pack the trajectories of an iteration; with `drop_zero_variance`, those are left out of the batches.

    Where that would leave nothing, everything is kept.

    Args:
        rewards: for each trajectory the rewards [K] of its K steps, float32.
        zero_variance: bool [N], see `groups.has_zero_variance`.

    Raises:
        UserError: a sample is longer than a row.
        ValueError: as `pack` and `tabulate`.
    """
    groups = number_groups(trajectories)
    is_kept = np.ones_like(zero_variance)
    if ALGORITHMS[config.algorithm].is_grouped and config.drop_zero_variance and not zero_variance.all():
        is_kept = ~zero_variance
    kept, left_out = np.flatnonzero(is_kept).tolist(), np.flatnonzero(~is_kept).tolist()
    samples = [sample for i in kept for sample in trajectories[i].samples]
    batches, starts = minibatches(samples, row_length=config.row_length, batch_rows=config.batch_rows, rng=rng)
    rows = [*kept, *left_out]
    table = tabulate(
        [trajectories[i] for i in rows], [rewards[i] for i in rows], starts, groups[rows],
        num_tokens=len(batches) * config.batch_rows * config.row_length,
    )  # fmt: skip
    metrics = {
        "fill": float(np.mean([fill_fraction(batch) for batch in batches])),
        "learnt_from": len(kept) / len(trajectories),
        "equal_groups": len(np.unique(groups[zero_variance])) / len(np.unique(groups)),
    }
    order = [i for _ in range(config.epochs) for i in rng.permutation(len(batches)).tolist()]
    return IterationBatches(batches, table, order, metrics, rows)


def fill_fraction(batch: TrainBatch) -> float:
    """Share of the batch's tokens that are not padding."""
    return float(np.mean(np.asarray(batch.segment_ids) > 0))

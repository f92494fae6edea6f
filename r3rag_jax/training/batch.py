"""Trajectories -> TrainBatch: packs samples into rows, places rewards, masks the padding, finds trajectories again.

Arrays stay on the host (numpy); the caller puts them on its mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from r3rag_jax.data.packing import first_fit_decreasing, join, row_layout
from r3rag_jax.types import Sample, TrainBatch, Trajectory, TrajectoryTable


def pack(
    samples: Sequence[Sample],
    step_rewards: Sequence[np.ndarray],
    trajectory_ids: Sequence[int],
    *,
    row_length: int,
    num_rows: int | None = None,
    has_branches: bool = False,
) -> TrainBatch:
    """Packs samples, each whole, into rows of `row_length` tokens by first-fit-decreasing.

    The reward of a step sits on the last policy token of the step.

    Args:
        step_rewards: for each sample the rewards [T] of its trajectory, indexed by `step_ids`.
        trajectory_ids: for each sample the number of its trajectory.
        num_rows: rows of the batch, empty ones included; default: as many as are needed.
        has_branches: whether the samples are trees.

    Returns:
        numpy arrays [num_rows, row_length].

    Raises:
        UserError: a sample is longer than a row.
        ValueError: a reward that is missing or not finite, or more rows needed than `num_rows`.
    """
    rows = first_fit_decreasing([len(sample) for sample in samples], row_length)
    if num_rows is not None:
        if len(rows) > num_rows:
            raise ValueError(f"the samples must fit num_rows={num_rows} rows; need {len(rows)}")
        rows += [[]] * (num_rows - len(rows))
    columns = [_columns(*of_one) for of_one in zip(samples, step_rewards, trajectory_ids, strict=True)]

    def stack(name: str, dtype: type, fill: float = 0) -> Any:
        cells = [join([columns[i][name] for i in row], row_length, dtype, fill) for row in rows]
        return np.stack(cells) if cells else np.zeros((0, row_length), dtype)

    layouts = [row_layout([samples[i] for i in row], row_length, has_branches=has_branches) for row in rows]

    def layout(name: str) -> Any:
        return np.asarray([one[name] for one in layouts], np.int32).reshape(len(rows), row_length)

    return TrainBatch(
        tokens=stack("tokens", np.int32),
        positions=layout("positions"),
        segment_ids=layout("segment_ids"),
        branch_ids=layout("branch_ids") if has_branches else None,
        loss_mask=stack("loss_mask", np.bool_),
        behaviour_logprobs=stack("behaviour_logprobs", np.float32),
        rewards=stack("rewards", np.float32),
        trajectory_ids=stack("trajectory_ids", np.int32, fill=-1),
        step_ids=stack("step_ids", np.int32, fill=-1),
        temperature=stack("temperature", np.float32, fill=1),
    )


def _columns(sample: Sample, step_rewards: np.ndarray, trajectory_id: int) -> dict[str, np.ndarray]:
    """What the tokens of one sample carry, each [L].

    step_ids -1 0 0 -1 1, rewards 0.5 2.0  ->  rewards 0 0 0.5 0 2.0
    """
    if len(sample) and sample.loss_mask[0]:
        raise ValueError("a sample must open with its prompt: nothing predicts its first token")
    if not sample.has_logprobs:
        raise ValueError("a sample must hold the log-probabilities of its sampled tokens; got one without")
    num_tokens = len(sample)
    # The last policy token of each step, in the order of the steps.
    steps, from_end = np.unique(sample.step_ids[::-1], return_index=True)
    last_token = (num_tokens - 1 - from_end)[steps >= 0]
    steps = steps[steps >= 0]
    if len(steps) and steps[-1] >= len(step_rewards):
        raise ValueError(f"step {steps[-1]} must have a reward; got {len(step_rewards)} rewards")
    rewards = np.zeros(num_tokens, np.float32)
    rewards[last_token] = np.asarray(step_rewards, np.float32)[steps]
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite; got {step_rewards}")
    return {
        "tokens": sample.ids,
        "loss_mask": sample.loss_mask,
        "behaviour_logprobs": sample.behaviour_logprobs,
        "rewards": rewards,
        "trajectory_ids": np.where(sample.loss_mask, trajectory_id, -1),
        "step_ids": sample.step_ids,
        "temperature": np.full(num_tokens, sample.temperature or 1.0, np.float32),
    }


def minibatches(
    trajectories: Sequence[Trajectory],
    rewards: Sequence[np.ndarray],
    *,
    row_length: int,
    batch_rows: int,
    rng: np.random.Generator,
) -> list[TrainBatch]:
    """Packs all samples of all trajectories, shuffles the rows and cuts them into batches.

    Each sample is in exactly one batch; `trajectory_ids` count the trajectories as they came. The rows are dealt out
    evenly and empty ones fill up the batches: each of them makes a whole step, and one of a single row would be little
    but noise.

    Args:
        rewards: for each trajectory the rewards [T] of its T steps, float32.

    Raises:
        UserError, ValueError: as `pack`; also a reward that no or more than one sample carries.
    """
    packed = pack_trajectories(trajectories, rewards, row_length=row_length)
    num_rows = len(packed.tokens)
    num_batches = -(-num_rows // batch_rows)
    batches = []
    for rows in np.array_split(rng.permutation(num_rows), num_batches) if num_rows else ():
        empty = pack(
            [], [], [], row_length=row_length, num_rows=batch_rows - len(rows),
            has_branches=packed.branch_ids is not None,
        )  # fmt: skip
        batches.append(jax.tree.map(lambda x, y, rows=rows: np.concatenate([x[rows], y]), packed, empty))
    return batches


def pack_trajectories(
    trajectories: Sequence[Trajectory], rewards: Sequence[np.ndarray], *, row_length: int, first: int = 0
) -> TrainBatch:
    """`pack` of all samples of all trajectories, which are numbered from `first` on, in as many rows as they need.

    Args, raises: as `minibatches`.
    """
    samples: list[Sample] = []
    step_rewards: list[np.ndarray] = []
    ids: list[int] = []
    for number, (trajectory, rewards_T) in enumerate(zip(trajectories, rewards, strict=True), start=first):
        _check_rewards(trajectory, rewards_T)
        samples.extend(trajectory.samples)
        step_rewards.extend([rewards_T] * len(trajectory.samples))
        ids.extend([number] * len(trajectory.samples))
    has_branches = any(sample.branch_ids is not None for sample in samples)
    return pack(samples, step_rewards, ids, row_length=row_length, has_branches=has_branches)


def tabulate(batches: Sequence[TrainBatch], groups: np.ndarray) -> TrajectoryTable:
    """Finds the tokens of each trajectory in the batches of an iteration, host arrays; one line per trajectory.

    Lines and width are rounded up to a power of two, so that few shapes are compiled for.

    batches  trajectory_ids  1 1 . 0 0 | 1 . . 0 .      places      3 4 8
             step_ids        0 0 . 0 0 | 1 . . 2 .  ->              0 1 5
                                                        step_ids    0 0 2
                                                                    0 0 1
    Args:
        groups: int [N], for each trajectory the number of its question, below N.
    """

    def flat(name: str) -> np.ndarray:
        return np.concatenate([np.ravel(getattr(batch, name)) for batch in batches] or [np.zeros(0, np.int32)])

    ids, step_ids, rewards = flat("trajectory_ids"), flat("step_ids"), flat("rewards")
    places = np.flatnonzero(ids >= 0)
    places = places[np.lexsort((places, step_ids[places], ids[places]))]
    num_lines = _bucket(len(groups))
    counts = np.bincount(ids[places], minlength=num_lines)
    width = _bucket(int(counts.max(initial=1)))
    mask = np.arange(width) < counts[:, None]
    table: dict[str, np.ndarray] = {
        "places": np.full(mask.shape, len(ids), np.int32),
        "rewards": np.zeros(mask.shape, np.float32),
        "step_ids": np.zeros(mask.shape, np.int32),
    }
    for name, values in (("places", places), ("rewards", rewards[places]), ("step_ids", step_ids[places])):
        table[name][mask] = values
    numbers = np.zeros(num_lines, np.int32)
    numbers[: len(groups)] = groups
    return TrajectoryTable(**table, mask=mask, groups=numbers)  # type: ignore[arg-type]  # numpy until they are put


def _bucket(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()


def _check_rewards(trajectory: Trajectory, rewards_T: np.ndarray) -> None:
    """Each step must have a reward, and each reward exactly one sample to sit in."""
    if len(rewards_T) != len(trajectory.steps):
        raise ValueError(f"each of the {len(trajectory.steps)} steps must have a reward; got {len(rewards_T)}")
    carried = [np.unique(sample.step_ids[sample.loss_mask]) for sample in trajectory.samples]
    counts = np.bincount(np.concatenate([*carried, np.arange(0)]), minlength=len(rewards_T))[: len(rewards_T)]
    wrong = np.flatnonzero((counts > 1) | ((counts == 0) & (rewards_T != 0)))
    if len(wrong):
        step = wrong[0]
        raise ValueError(
            f"the reward of a step must sit in exactly one sample; {counts[step]} samples of "
            f"question {trajectory.question.id!r} have policy tokens of step {step}"
        )


def fill_fraction(batch: TrainBatch) -> float:
    """Share of the batch's tokens that are not padding."""
    return float(np.mean(np.asarray(batch.segment_ids) > 0))

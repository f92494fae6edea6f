"""Packing trajectories into training batches: layout, rewards, episodes, padding."""

import dataclasses

import jax
import numpy as np
import pytest

from r3rag_jax.config import RLConfig
from r3rag_jax.errors import UserError
from r3rag_jax.training.batch import fill_fraction, minibatches, pack, pack_iteration, tabulate
from r3rag_jax.types import Question, Sample, Status, Step, TrainBatch, Trajectory, TrajectoryTable


def sample(first: int, step_ids: list[int], temperature: float = 1.0) -> Sample:
    """Tokens count up from `first`; log-probabilities are -0.5 on policy tokens."""
    steps = np.asarray(step_ids, np.int32)
    return Sample(
        ids=np.arange(first, first + len(steps), dtype=np.int32),
        loss_mask=steps >= 0,
        behaviour_logprobs=np.where(steps >= 0, -0.5, 0).astype(np.float32),
        step_ids=steps,
        temperature=temperature,
    )


def trajectory(index: int, *samples: Sample) -> Trajectory:
    num_steps = int(max(s.step_ids.max() for s in samples)) + 1
    steps = (Step("a", query="q"),) * (num_steps - 1) + (Step("a", answer="b"),)
    question = Question(f"q{index}", "?", ("b",))
    return Trajectory(question, steps, Status.ANSWERED, samples)


# A prompt of 2, step 0, two passage tokens, step 1.
TWO_STEPS = sample(10, [-1, -1, 0, 0, -1, -1, 1, 1, 1], temperature=0.4)
ONE_STEP = sample(50, [-1, 0, 0, -1], temperature=0)
REWARDS = [np.asarray([0.1, 2.0], np.float32), np.asarray([-1.0], np.float32)]


def packed(**options: int) -> TrainBatch:
    defaults = {"row_length": 15, "num_rows": 2}
    return pack([ONE_STEP, TWO_STEPS], **(defaults | options))[0]


def tabulated(*attempts: Trajectory, rewards: list[np.ndarray], row_length: int = 15) -> TrajectoryTable:
    """The table of trajectories, each of a question of its own, all in one batch."""
    batch, starts = pack([sample for attempt in attempts for sample in attempt.samples], row_length=row_length)
    return tabulate(attempts, rewards, starts, np.arange(len(attempts)), num_tokens=batch.tokens.size)


def test_layout() -> None:
    batch = packed()
    row = [10, 11, 12, 13, 14, 15, 16, 17, 18, 50, 51, 52, 53, 0, 0]
    assert batch.tokens.tolist() == [row, [0] * 15]
    assert batch.positions.tolist() == [[*range(9), *range(4), 0, 0], [0] * 15]
    assert batch.segment_ids.tolist() == [[1] * 9 + [2] * 4 + [0] * 2, [0] * 15]
    mask = [0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0]
    assert batch.loss_mask.astype(int).tolist() == [mask, [0] * 15]
    assert batch.behaviour_logprobs.tolist() == [[-0.5 * m for m in mask], [0] * 15]
    np.testing.assert_allclose(batch.temperature, [[0.4] * 9 + [1] * 6, [1] * 15])
    assert fill_fraction(batch) == pytest.approx(13 / 30)


def test_rewards_sit_on_the_last_policy_token_of_their_step() -> None:
    table = tabulated(trajectory(0, ONE_STEP), trajectory(1, TWO_STEPS), rewards=REWARDS[::-1])
    want = np.zeros((2, 8), np.float32)
    want[0, 1], want[1, [1, 4]] = -1.0, [0.1, 2.0]
    np.testing.assert_array_equal(table.rewards, want)


def test_each_token_is_in_the_row_of_its_trajectory() -> None:
    table = tabulated(trajectory(0, ONE_STEP), trajectory(1, TWO_STEPS), rewards=REWARDS[::-1])
    assert table.indices.tolist() == [[10, 11] + [15] * 6, [2, 3, 6, 7, 8] + [15] * 3]  # 15 tokens, the longer first
    assert table.step_ids.tolist() == [[0] * 8, [0, 0, 1, 1, 1, 0, 0, 0]]
    assert table.mask.sum(axis=1).tolist() == [2, 5]


def test_dtypes_and_pytree() -> None:
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(packed())]
    i, b, f = np.dtype(np.int32), np.dtype(np.bool_), np.dtype(np.float32)
    assert dtypes == [i, i, i, b, f, f]


def test_integer_rewards_keep_their_tenths() -> None:
    """A peer's PPO put rewards into the token ids' int32 and trained on 0 instead of 0.7."""
    table = tabulated(trajectory(0, ONE_STEP), rewards=[[0.7]], row_length=4)
    assert table.rewards.dtype == np.float32
    assert table.rewards[0, 1] == np.float32(0.7)


def test_a_later_step_alone_in_its_sample() -> None:
    """Protocol `steps`: the sample of step 1 takes reward 1 of its trajectory."""
    attempt = trajectory(0, sample(0, [-1, 0]), sample(0, [-1, 1, 1]))
    table = tabulated(attempt, rewards=REWARDS[:1], row_length=4)
    assert table.rewards.tolist() == [[np.float32(0.1), 0, 2, 0]]
    assert table.step_ids.tolist() == [[0, 1, 1, 0]]
    assert table.indices.tolist() == [[5, 1, 2, 8]]  # rows of 4: the longer sample is in the first


def test_a_sample_without_policy_tokens_trains_nothing() -> None:
    batch, _ = pack([sample(1, [-1, -1])], row_length=3)
    assert batch.segment_ids.tolist() == [[1, 1, 0]]
    assert not batch.loss_mask.any()


def test_refused() -> None:
    with pytest.raises(UserError, match=r"row_length=8 tokens; 1 of 2 do not, the longest has 9"):
        packed(row_length=8)
    with pytest.raises(ValueError, match="must fit num_rows=1 rows; need 2"):
        packed(row_length=12, num_rows=1)
    one_step = dataclasses.replace(trajectory(0, TWO_STEPS), steps=(Step("a", answer="b"),))
    with pytest.raises(ValueError, match="step 1 must have a reward; got 1 rewards"):
        tabulated(one_step, rewards=[[1.0]])
    with pytest.raises(ValueError, match="rewards must be finite"):
        tabulated(trajectory(0, ONE_STEP), rewards=[[np.nan]])
    with pytest.raises(ValueError, match="steps must come in their order; those of question 'q0' do not"):
        tabulated(trajectory(0, sample(0, [-1, 1, 0])), rewards=REWARDS[:1])
    with pytest.raises(ValueError, match="must open with its prompt"):
        pack([sample(0, [0, 0])], row_length=9)


def many(count: int = 23) -> tuple[list[Trajectory], list[np.ndarray]]:
    """Trajectory i has tokens 100 * i …, one to three steps, rewards (i + 1) + 0.1 * step."""
    rng = np.random.default_rng(0)
    trajectories, rewards = [], []
    for i in range(count):
        num_steps = int(rng.integers(1, 4))
        step_ids = [-1] * int(rng.integers(1, 6))
        for step in range(num_steps):
            step_ids += [step] * int(rng.integers(1, 8)) + [-1] * int(rng.integers(0, 6))
        trajectories.append(trajectory(i, sample(100 * i + 1, step_ids)))
        rewards.append((i + 1 + 0.1 * np.arange(num_steps)).astype(np.float32))
    return trajectories, rewards


def samples_of(trajectories: list[Trajectory]) -> list[Sample]:
    return [sample for attempt in trajectories for sample in attempt.samples]


def test_minibatches_hold_every_sample_once() -> None:
    trajectories, _ = many()
    rng = np.random.default_rng(1)
    batches, starts = minibatches(samples_of(trajectories), row_length=48, batch_rows=4, rng=rng)
    assert {batch.tokens.shape for batch in batches} == {(4, 48)}
    tokens = np.concatenate([batch.tokens[batch.segment_ids > 0] for batch in batches])
    expected = np.concatenate([t.samples[0].ids for t in trajectories])
    np.testing.assert_array_equal(np.sort(tokens), np.sort(expected))
    flat = np.concatenate([batch.tokens.ravel() for batch in batches])
    for sample, start in zip(samples_of(trajectories), starts, strict=True):
        np.testing.assert_array_equal(flat[start : start + len(sample)], sample.ids)
    is_full = [(batch.segment_ids > 0).any(axis=1) for batch in batches]
    counts = [int(rows.sum()) for rows in is_full]
    assert len(batches) == -(-sum(counts) // 4)
    assert max(counts) - min(counts) <= 1  # dealt out evenly
    assert all(rows.tolist() == [True] * n + [False] * (4 - n) for rows, n in zip(is_full, counts, strict=True))


def test_minibatches_are_shuffled_by_the_generator_alone() -> None:
    trajectories, _ = many()

    def order(seed: int) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        options = {"row_length": 48, "batch_rows": 2, "rng": rng}
        return [b.tokens[:, 0].tolist() for b in minibatches(samples_of(trajectories), **options)[0]]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_minibatches_of_one_sample_per_step() -> None:
    steps = trajectory(0, sample(1, [-1, 0, 0]), sample(11, [-1, -1, 1]))
    rng = np.random.default_rng(0)
    (batch,), starts = minibatches(steps.samples, row_length=6, batch_rows=1, rng=rng)
    assert batch.tokens.tolist() == [[1, 2, 3, 11, 12, 13]]
    table = tabulate([steps], [np.asarray([0.5, 2.0], np.float32)], starts, np.zeros(1, int), num_tokens=6)
    assert table.indices.tolist() == [[1, 2, 5, 6]]
    assert table.rewards.tolist() == [[0, 0.5, 2, 0]]


def test_no_trajectories_give_no_batch() -> None:
    rng = np.random.default_rng(0)
    assert minibatches([], row_length=8, batch_rows=2, rng=rng)[0] == []


@pytest.mark.parametrize(
    ("samples", "rewards", "expected"),
    [
        ([[-1, 0], [-1, 1]], [1.0], "each of the 2 steps must have a reward; got 1"),
        ([[-1, 1]], [1.0, 1.0], "0 samples of question 'q0' have policy tokens of step 0"),
        (
            [[-1, 0], [-1, 0, 1]],
            [0.0, 1.0],
            "2 samples of question 'q0' have policy tokens of step 0",
        ),
    ],
)
def test_a_reward_is_neither_lost_nor_doubled(samples: list[list[int]], rewards: list[float], expected: str) -> None:
    attempt = trajectory(0, *[sample(1, step_ids) for step_ids in samples])
    with pytest.raises(ValueError, match=expected):
        tabulated(attempt, rewards=[np.asarray(rewards)])


# --------------------------------------------------------------------------- trajectories found again


@pytest.mark.parametrize("is_one_sequence", [True, False])
def test_a_table_has_each_trajectory_in_the_order_it_was_written(is_one_sequence: bool) -> None:
    """Tokens of one trajectory, and their rewards, whether they are one sample or one per step, in several batches."""
    trajectories, rewards = many()
    if not is_one_sequence:
        trajectories = [dataclasses.replace(t, samples=split_steps(t.samples[0])) for t in trajectories]
    options = {"row_length": 48, "batch_rows": 4, "rng": np.random.default_rng(1)}
    batches, starts = minibatches(samples_of(trajectories), **options)
    assert len(batches) > 1
    tokens = np.concatenate([batch.tokens.ravel() for batch in batches])
    table = tabulate(trajectories, rewards, starts, np.arange(23) // 2, num_tokens=len(tokens))
    assert table.mask.shape == (32, 32)  # the longest has 19 to 32
    assert table.groups.tolist() == [*(np.arange(23) // 2), *[0] * 9]
    for line, (attempt, earned) in enumerate(zip(trajectories, rewards, strict=True)):
        mask = table.mask[line]
        assert mask.tolist() == sorted(mask, reverse=True)
        want = np.concatenate([sample.ids[sample.loss_mask] for sample in attempt.samples])
        np.testing.assert_array_equal(tokens[table.indices[line][mask]], want)
        steps = np.concatenate([sample.step_ids[sample.loss_mask] for sample in attempt.samples])
        np.testing.assert_array_equal(table.step_ids[line][mask], steps)
        is_last = np.append(steps[1:] != steps[:-1], True)
        np.testing.assert_array_equal(table.rewards[line][mask], np.where(is_last, earned[steps], 0))
    assert (table.indices[~table.mask] == len(tokens)).all()


def split_steps(whole: Sample) -> tuple[Sample, ...]:
    """The protocol `steps`: each step in a sample whose prompt is all that came before."""
    made = []
    for step in range(whole.step_ids.max() + 1):
        end = int(np.flatnonzero(whole.step_ids == step)[-1]) + 1
        mask = whole.step_ids[:end] == step
        made.append(Sample(whole.ids[:end], mask, whole.behaviour_logprobs[:end] * mask, np.where(mask, step, -1)))
    return tuple(made)


def test_trajectories_that_are_left_out_have_rows_and_no_tokens_in_a_batch() -> None:
    """The first of two has a batch; of the other the table has rewards and steps alone."""
    first, second = trajectory(0, TWO_STEPS), trajectory(1, ONE_STEP)
    _, starts = pack(first.samples, row_length=9)
    table = tabulate([first, second], REWARDS, starts, np.arange(2), num_tokens=9)
    assert table.indices.tolist() == [[2, 3, 6, 7, 8, 9, 9, 9], [9] * 8]
    assert table.mask.sum(axis=1).tolist() == [5, 2]
    assert table.rewards[1].tolist() == [0, -1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("algorithm", "is_dropped"), [("rloo", True), ("reinforce++", False)])
def test_what_teaches_nothing_is_left_out_where_samples_are_compared(algorithm: str, is_dropped: bool) -> None:
    trajectories, rewards = many(4)
    trajectories = [dataclasses.replace(t, question=Question(q, "?", ("b",)))
                    for t, q in zip(trajectories, "xxyy", strict=True)]  # fmt: skip
    config = RLConfig(algorithm=algorithm, row_length=48, batch_rows=2, epochs=2, drop_zero_variance=True)
    zero_variance = np.asarray([True, True, False, False])
    packed = pack_iteration(trajectories, rewards, zero_variance, config, np.random.default_rng(0))
    tokens = {int(token) for batch in packed.batches for token in batch.tokens[batch.loss_mask]}
    dropped = {int(token) for t in trajectories[:2] for token in t.samples[0].ids[t.samples[0].loss_mask]}
    assert not tokens & dropped if is_dropped else dropped < tokens
    assert packed.table.mask.any(axis=1).sum() == 4
    assert packed.metrics["learnt_from"] == (0.5 if is_dropped else 1.0)
    assert packed.metrics["equal_groups"] == 0.5
    assert sorted(packed.order) == sorted([*range(len(packed.batches))] * 2)
    everything = pack_iteration(trajectories, rewards, np.ones(4, bool), config, np.random.default_rng(0))
    assert everything.metrics["learnt_from"] == 1.0  # an iteration is never empty

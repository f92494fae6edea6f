"""The cold start's pipeline: packing, every sample once an epoch, shards, saved == resumed."""

import json
from collections import Counter

import numpy as np
import pytest

from r3rag_jax.data.packing import plan_rows
from r3rag_jax.data.sft import FlatSamples, SFTBatch, SFTBatches, SFTSample
from r3rag_jax.errors import UserError

FIELDS = ("tokens", "positions", "segment_ids", "loss_mask")


def sample(index: int, length: int) -> SFTSample:
    """Tokens tell sample and place: 1000 * index + place; the first third is the prompt."""
    place = np.arange(length)
    return SFTSample((1000 * index + place).astype(np.int32), place > length // 3)


def samples(count: int = 60, seed: int = 0) -> list[SFTSample]:
    lengths = np.random.default_rng(seed).integers(2, 40, count)
    return [sample(i, n) for i, n in enumerate(lengths, 1)]


def batches(data: list[SFTSample], **options: object) -> SFTBatches:
    defaults = {"row_length": 64, "batch_rows": 4, "epochs": 2, "seed": 0}
    return SFTBatches(data, **(defaults | options))


def assert_equal(a: SFTBatch, b: SFTBatch) -> None:
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def test_layout_of_a_row() -> None:
    (batch,) = batches([sample(1, 3), sample(2, 4)], row_length=9, batch_rows=2, epochs=1)
    assert batch.tokens.tolist() == [[2000, 2001, 2002, 2003, 1000, 1001, 1002, 0, 0], [0] * 9]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 0], [0] * 9]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0, 0], [0] * 9]
    assert batch.loss_mask.tolist() == [
        [False, False, True, True, False, False, True, False, False],
        [False] * 9,
    ]
    assert [getattr(batch, f).dtype for f in FIELDS] == [np.int32, np.int32, np.int32, np.bool_]


def test_every_sample_is_whole_and_once_an_epoch() -> None:
    data = samples()
    stream = batches(data)
    seen: Counter[int] = Counter()
    total = 0
    for batch in stream:
        for row in range(len(batch.tokens)):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                cells = batch.segment_ids[row] == segment
                index = int(batch.tokens[row][cells][0]) // 1000
                np.testing.assert_array_equal(batch.tokens[row][cells], data[index - 1].ids)
                np.testing.assert_array_equal(batch.loss_mask[row][cells], data[index - 1].loss_mask)
                seen[index] += 1
        total += 1
    assert seen == {index: 2 for index in range(1, 61)}
    assert total == stream.num_steps == stream.step
    assert stream.num_examples == 120


def test_order_depends_on_seed_and_epoch_alone() -> None:
    data = samples()
    for a, b in zip(batches(data), batches(data, num_threads=1), strict=True):
        assert_equal(a, b)
    rows = [plan_rows([len(s) for s in data], row_length=64, epochs=2, seed=s).rows for s in (0, 1)]
    half = len(rows[0]) // 2
    assert rows[0] != rows[1]
    assert rows[0][:half] != rows[0][half:]


@pytest.mark.parametrize("read", [0, 1, 5, 9])
def test_saved_is_resumed(read: int) -> None:
    data = samples()
    stream = batches(data)
    for _ in range(read):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    rest = list(stream)
    for resumed in (batches(data), stream):  # a fresh process, and one that had run ahead
        resumed.set_state(state)
        assert resumed.step == read
        assert resumed.get_state() == state
        for a, b in zip(rest, resumed, strict=True):
            assert_equal(a, b)


def test_finished_stays_finished() -> None:
    stream = batches(samples())
    num_batches = len(list(stream))
    state = stream.get_state()
    assert state["examples"] == 120
    resumed = batches(samples())
    resumed.set_state(state)
    assert (num_batches, list(resumed), resumed.step) == (resumed.num_steps, [], resumed.num_steps)


@pytest.mark.parametrize("rows", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 1, 2, 3], [0, 1, 2, 3]], [[0], [1, 2, 3]]])
def test_processes_make_their_rows_of_a_batch(rows: list[list[int]]) -> None:
    data = samples()
    whole = batches(data)
    shards = [batches(data, rows=own) for own in rows]
    for step, (batch, *parts) in enumerate(zip(whole, *shards, strict=True)):
        assert_equal(batch, whole.whole(step))
        assert whole.num_tokens(step) == int((batch.segment_ids > 0).sum())
        for own, part in zip(rows, parts, strict=True):
            for field in FIELDS:
                np.testing.assert_array_equal(getattr(batch, field)[own], getattr(part, field))
    assert whole.num_examples == 120


@pytest.mark.parametrize("after", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[2], [0], [3], [1]]])
def test_resumes_on_another_number_of_processes_bit_for_bit(after: list[list[int]]) -> None:
    data = samples()
    before = [batches(data, rows=own) for own in ([0], [1], [2], [3])]
    for stream in before:
        next(stream)
        next(stream)
    (state,) = {tuple(stream.get_state().items()) for stream in before}
    whole = batches(data)
    next(whole)
    next(whole)
    streams = [batches(data, rows=own) for own in after]
    for stream in streams:
        stream.set_state(json.loads(json.dumps(dict(state))))
    for expected, *parts in zip(whole, *streams, strict=True):
        for field in FIELDS:
            found = np.empty_like(getattr(expected, field))
            for own, part in zip(after, parts, strict=True):
                found[own] = getattr(part, field)
            assert found.tobytes() == getattr(expected, field).tobytes()


def test_samples_of_groups_are_made_when_they_are_asked_for() -> None:
    made: list[int] = []

    class Groups(list):
        def __getitem__(self, index):
            made.append(index)
            return super().__getitem__(index)

        def __iter__(self):
            return iter([super(Groups, self).__getitem__(index) for index in range(len(self))])

    data = samples(7)
    flat = FlatSamples(Groups([data[:2], [], data[2:3], data[3:]]))
    assert flat.lengths.tolist() == [len(one) for one in data] and made == []
    assert [flat[index].ids.tolist() for index in range(7)] == [one.ids.tolist() for one in data]
    assert made == [0, 0, 2, 3, 3, 3, 3]
    assert flat[-1] is data[-1]
    for a, b in zip(batches(data), batches(flat), strict=True):
        assert_equal(a, b)


def test_resumes_with_another_batch_size() -> None:
    data = samples()
    stream = batches(data)
    next(stream)
    resumed = batches(data, batch_rows=3)
    resumed.set_state(stream.get_state())
    rows_a = np.concatenate([batch.tokens for batch in stream])
    rows_b = np.concatenate([batch.tokens for batch in resumed])
    num_rows = len(stream.plan.rows) - 4
    np.testing.assert_array_equal(rows_a[:num_rows], rows_b[:num_rows])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epochs": 3}, {"row_length": 50}])
def test_another_plan_is_refused(change: dict[str, int]) -> None:
    state = batches(samples()).get_state()
    with pytest.raises(UserError, match="resume only with the same samples"):
        batches(samples(), **change).set_state(state)


def test_long_samples_are_an_error_or_counted() -> None:
    data = [*samples(10), sample(11, 65), sample(12, 99)]
    with pytest.raises(UserError, match=r"row_length=64 tokens; 2 of 12 do not, the longest has 99"):
        batches(data)
    stream = batches(data, too_long="drop")
    assert (stream.plan.num_dropped, stream.plan.num_samples) == (2, 10)
    assert sum((batch.tokens[:, 0] > 0).sum() for batch in stream) == len(stream.plan.rows)
    assert stream.num_examples == 20
    with pytest.raises(UserError, match="got none among 2"):
        batches(data[-2:], too_long="drop")


def test_bad_settings() -> None:
    with pytest.raises(UserError, match=r"sft\.batch_rows must be at least 1; got 0"):
        batches(samples(), batch_rows=0)
    with pytest.raises(UserError, match="epochs must be at least 1; got 0"):
        batches(samples(), epochs=0)


def test_bad_samples() -> None:
    with pytest.raises(ValueError, match="must have one length, at least 1; got 2 and 3"):
        SFTSample(np.zeros(2, np.int32), np.zeros(3, np.bool_))
    with pytest.raises(ValueError, match="must be False for the first token"):
        SFTSample(np.zeros(2, np.int32), np.ones(2, np.bool_))

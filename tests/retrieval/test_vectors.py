"""Vectors in memory-mapped shards: any rows, in any dtype, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.vectors import VectorShards, shard_name, write_shard


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_are_those_of_one_array_wherever_the_shards_end(tmp_path: Path, dtype: type) -> None:
    whole = np.random.default_rng(0).normal(size=(11, 3)).astype(dtype)
    for number, (start, stop) in enumerate([(0, 4), (4, 8), (8, 11)]):
        write_shard(tmp_path, number, whole[start:stop])
    shards = VectorShards.open(tmp_path)
    assert (shards.shape, shards.dtype, len(shards)) == ((11, 3), np.dtype(dtype), 11)
    assert all(isinstance(shard, np.memmap) for shard in shards)
    np.testing.assert_array_equal(np.concatenate(list(shards)), whole)
    for start in range(12):
        for stop in range(start, 12):
            np.testing.assert_array_equal(shards.rows(start, stop), whole[start:stop])
    for size in (1, 4, 5, 20):
        blocks = list(shards.blocks(size, 2, 10))
        assert [first for first, _ in blocks] == list(range(2, 10, size))
        np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), whole[2:10])
    positions = np.array([10, 0, 4, 3, 7, 8, 0])
    taken = shards.take(positions)
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, whole[positions].astype(np.float32))
    for start, stop in [(-1, 2), (3, 2), (0, 12)]:
        with pytest.raises(IndexError, match=r"rows must be in \[0, 11\); got"):
            shards.rows(start, stop)


def test_shards_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"an index of vectors holds vectors-00000\.npy; .* is missing"):
        VectorShards.open(tmp_path)
    write_shard(tmp_path, 0, np.ones((2, 3), np.float32))
    write_shard(tmp_path, 1, np.ones((2, 3), np.float16))
    with pytest.raises(UserError, match=r"all float16 or all float32, of one size; got float16 \[n, 3\], float32"):
        VectorShards.open(tmp_path)
    (tmp_path / shard_name(1)).rename(tmp_path / shard_name(2))
    with pytest.raises(UserError, match=r"holds vectors-00001\.npy; .*vectors-00001\.npy is missing"):
        VectorShards.open(tmp_path)
    (tmp_path / shard_name(2)).unlink()
    data = (tmp_path / shard_name(0)).read_bytes()
    (tmp_path / shard_name(0)).write_bytes(data[:-4])
    with pytest.raises(UserError, match=r"vectors-00000\.npy must be an array in numpy's format"):
        VectorShards.open(tmp_path)
    with pytest.raises(ValueError, match=r"arrays \[n, D\], at least one; got \[\]"):
        VectorShards([])

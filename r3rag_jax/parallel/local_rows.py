"""Batches of which each process makes only the rows that its devices hold."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from r3rag_jax.parallel.shardings import batch_shardings


def local_rows(mesh: Mesh, num_rows: int) -> list[int]:
    """The rows of a batch that the devices of this process hold, in order: all, where the batch is not split."""
    sharding = batch_shardings(mesh, np.zeros(num_rows, np.bool_))
    held: set[int] = set()
    for (rows,) in sharding.addressable_devices_indices_map((num_rows,)).values():
        held.update(range(num_rows)[rows])
    return sorted(held)


def device_put_rows(mesh: Mesh, tree: Any, rows: list[int], num_rows: int) -> Any:
    """Copy rows of a host batch to a mesh, as `shardings.device_put_batch` does with a whole one.

    Args:
        tree: arrays [len(rows), …], the rows that this process makes.
        rows: their numbers in the batch, `local_rows`.
        num_rows: of the batch.
    """
    place = {row: index for index, row in enumerate(rows)}

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        shape = (num_rows, *x.shape[1:])
        sharding = batch_shardings(mesh, np.broadcast_to(np.zeros((), x.dtype), shape))
        if sharding.is_fully_addressable and len(rows) == num_rows:
            return jax.device_put(x, sharding)

        def shard(index: Any) -> np.ndarray:  # a slice for each dimension
            local = [place[row] for row in range(num_rows)[index[0]]]
            return x[local][(slice(None), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, shard)

    return jax.tree.map(one, tree)

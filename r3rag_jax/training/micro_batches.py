"""Gradient accumulation: a batch is computed in micro-batches whose losses and gradients add up to the batch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from r3rag_jax.parallel.shardings import batch_ways, partition_spec
from r3rag_jax.training.state import Targets
from r3rag_jax.types import SFTBatch, TrainBatch


class BatchShare(NamedTuple):
    """Which share of its batch a micro-batch holds, float32 []: the weight of its means in the batch's means."""

    tokens: Any = 1.0  # trained tokens
    sequences: Any = 1.0  # trajectories or steps, each counted by its share of tokens; 0 without targets.shares
    gains: Any = 1.0  # tokens with a positive advantage


FULL_BATCH = BatchShare()


def split_micro_batches(mesh: Mesh, batch: Any, micro_tokens: int) -> tuple[int, Any]:
    """Cut a batch into micro-batches of whole rows, so that every device has rows of each.

    Args:
        batch: tuple of pytrees of arrays [B, L], the first of them an `SFTBatch`.
        micro_tokens: most tokens of a micro-batch on one device; a row that is longer is one by itself. 0: no limit.

    Returns:
        The number M of micro-batches, as few as the limit allows, and their arrays: [M, B / M, L], or the batch as it
        came where M is 1.
    """
    num_rows, length = batch[0].tokens.shape
    ways = batch_ways(mesh, num_rows)
    rows_per_device = num_rows // ways
    max_rows = max(1, micro_tokens // length) if micro_tokens else rows_per_device
    counts = range(1, rows_per_device + 1)
    num = min(n for n in counts if rows_per_device % n == 0 and rows_per_device // n <= max_rows)

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(ways, num, -1, length).swapaxes(0, 1).reshape(num, -1, length)
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(mesh, partition_spec(mesh, (None, "batch", None), x.shape))
        )

    return num, batch if num == 1 else jax.tree.map(split, batch)


def value_and_grad(
    loss: Callable[..., Any], params: Any, num_micro_batches: int, batch: Any, *, unroll: bool
) -> tuple[Any, Any]:
    """((loss, metrics), gradients) of a batch, summed over its micro-batches one after the other.

    Args:
        loss: (params, *micro-batch, BatchShare) -> (loss, metrics), each the micro-batch's contribution to the batch's.
            `sampler_gap` is the one metric of which the largest counts.
        num_micro_batches, batch: as `split_micro_batches` returns them.
        unroll: whether the loop over micro-batches is unrolled at compile time.
    """
    compute = jax.value_and_grad(loss, has_aux=True)
    if num_micro_batches == 1:
        return compute(params, *batch, FULL_BATCH)
    whole = _counts(*batch)

    def add(total: Any, batch: Any) -> tuple[Any, None]:
        counts = zip(_counts(*batch), whole, strict=True)
        share = BatchShare(*(mine / jnp.where(all_ > 0, all_, 1.0) for mine, all_ in counts))
        found = compute(params, *batch, share)
        summed = jax.tree.map(jnp.add, total, found)
        if "sampler_gap" in found[0][1]:
            summed[0][1]["sampler_gap"] = jnp.maximum(total[0][1]["sampler_gap"], found[0][1]["sampler_gap"])
        return summed, None

    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, params, *first, whole))
    return jax.lax.scan(add, zeros, batch, unroll=num_micro_batches if unroll else 1)[0]


def _counts(batch: SFTBatch | TrainBatch, targets: Targets | None = None) -> BatchShare:
    """What the shares are shares of, summed over all rows."""
    mask = batch.loss_mask
    shares = gains = jnp.zeros(())
    if targets is not None:
        shares = gains if targets.shares is None else jnp.sum(jnp.where(mask, targets.shares, 0.0))
        gains = jnp.sum(mask & (targets.advantages > 0), dtype=jnp.float32)
    return BatchShare(jnp.sum(mask, dtype=jnp.float32), shares, gains)

"""Losses and gradients of a batch, from those of its parts: rows of each device, and micro-batches of these rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from r3rag_jax.errors import UserError
from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.parallel.collectives import max_over_batch, per_device, sum_gradients, sum_over_batch
from r3rag_jax.parallel.shardings import RULES, batch_ways, tree_shardings
from r3rag_jax.parallel.target import Target
from r3rag_jax.training.state import Targets
from r3rag_jax.types import SFTBatch, TrainBatch


class BatchShare(NamedTuple):
    """Which share of its batch a part of it holds, float32 []: the weight of its means in the batch's means."""

    tokens: Any = 1.0  # trained tokens
    sequences: Any = 1.0  # trajectories or steps, each counted by its share of tokens; 0 without targets.shares
    gains: Any = 1.0  # tokens with a positive advantage


FULL_BATCH = BatchShare()
ROWS = PartitionSpec(RULES["batch"])


def param_specs(mesh: Mesh, tree: Any) -> Any:
    """The PartitionSpec of each parameter in a tree."""
    return jax.tree.map(lambda sharding: sharding.spec, tree_shardings(mesh, tree, PARAM_AXES))


def check_rows(mesh: Mesh, num_rows: int) -> None:
    """Refuse a batch whose rows do not divide by the devices: each device would compute all of them.

    Raises:
        UserError: names the numbers of rows next to it that do.
    """
    ways = batch_ways(mesh, 0)
    if num_rows % ways:
        below, above = num_rows // ways * ways, -(-num_rows // ways) * ways
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"batch_rows must be divisible by mesh.data * mesh.fsdp = {ways} (next: {nearest}); got {num_rows}"
        )


def num_micro_batches(rows_per_device: int, length: int, micro_tokens: int) -> int:
    """As few micro-batches of whole rows as the limit allows.

    Args:
        length: of a row, in tokens.
        micro_tokens: most tokens of a micro-batch on one device; a row that is longer is one by itself. 0: no limit.
    """
    max_rows = max(1, micro_tokens // length) if micro_tokens else rows_per_device
    counts = range(1, rows_per_device + 1)
    return min(n for n in counts if rows_per_device % n == 0 and rows_per_device // n <= max_rows)


def value_and_grad(
    mesh: Mesh, loss: Callable[..., Any], params: Any, constants: Any, batch: Any, micro_tokens: int = 0
) -> tuple[Any, Any]:
    """((loss, metrics), gradients) of a batch, summed over devices and over micro-batches one after the other.

    Parameters are gathered, and their gradients are summed over `fsdp`, where the loss uses them
    (`parallel/collectives.py`), so that no device ever has all of either. Over `data`, and for parameters that are not
    split, gradients are summed once, after all micro-batches.

    Args:
        loss: (params, constants, *micro-batch, BatchShare) -> (loss, metrics), each the micro-batch's contribution to
            the batch's. `sampler_gap` is the one metric of which the largest counts. On several devices it is called
            with a device's shards, for `Target.shard`.
        constants: pytree of parameters that are not trained, and of scalars.
        batch: tuple of pytrees of arrays [B, L], the first of them an `SFTBatch`.
        micro_tokens: see `num_micro_batches`.

    Raises:
        UserError: the rows do not divide by the devices.
    """
    check_rows(mesh, batch[0].tokens.shape[0])
    target = Target.of(mesh)
    specs = param_specs(mesh, params)

    def on_device(params: Any, constants: Any, batch: Any) -> tuple[Any, Any]:
        compute = lambda *part: jax.value_and_grad(loss, has_aux=True)(params, constants, *part)  # noqa: E731
        found, grads = _accumulated(compute, batch, micro_tokens, target)
        return _summed(found, target.shard()), sum_gradients(grads, specs, target.shard())

    in_specs = specs, param_specs(mesh, constants), ROWS
    out_specs = PartitionSpec(), specs
    return per_device(mesh, on_device, in_specs, out_specs)(params, constants, batch)


def _accumulated(compute: Callable[..., Any], batch: Any, micro_tokens: int, target: Target) -> tuple[Any, Any]:
    """((loss, metrics), gradients) of a device's rows."""
    num_rows, length = batch[0].tokens.shape
    num = num_micro_batches(num_rows, length, micro_tokens)
    if num == 1 and target.is_one_device:
        return compute(*batch, FULL_BATCH)
    whole = sum_over_batch(_counts(*batch), target.shard())

    def part(batch: Any) -> tuple[Any, Any]:
        counts = zip(_counts(*batch), whole, strict=True)
        return compute(*batch, BatchShare(*(mine / jnp.where(all_ > 0, all_, 1.0) for mine, all_ in counts)))

    if num == 1:
        return part(batch)

    def add(total: Any, batch: Any) -> tuple[Any, None]:
        found = part(batch)
        summed = jax.tree.map(jnp.add, total, found)
        if "sampler_gap" in found[0][1]:
            summed[0][1]["sampler_gap"] = jnp.maximum(total[0][1]["sampler_gap"], found[0][1]["sampler_gap"])
        return summed, None

    batch = jax.tree.map(lambda x: x.reshape(num, -1, length), batch)
    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, first))
    return jax.lax.scan(add, zeros, batch, unroll=1 if target.can_branch else num)[0]


def _summed(found: tuple[jax.Array, dict[str, jax.Array]], target: Target) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of the batch, from those of a device's rows."""
    value, metrics = sum_over_batch(found, target)
    if "sampler_gap" in metrics:
        metrics["sampler_gap"] = max_over_batch(found[1]["sampler_gap"], target)
    return value, metrics


def _counts(batch: SFTBatch | TrainBatch, targets: Targets | None = None) -> BatchShare:
    """What the shares are shares of, summed over all rows."""
    mask = batch.loss_mask
    shares = gains = jnp.zeros(())
    if targets is not None:
        shares = gains if targets.shares is None else jnp.sum(jnp.where(mask, targets.shares, 0.0))
        gains = jnp.sum(mask & (targets.advantages > 0), dtype=jnp.float32)
    return BatchShare(jnp.sum(mask, dtype=jnp.float32), shares, gains)

"""What one device of several reads of a decoder's parameters (`parallel/collectives.py`).

Parameters are stored as the rule table says. Before use they are gathered over `fsdp`, a layer at a time. Over `tensor`
each device has some heads and some columns of the feed-forward layer:

    heads divide by `tensor`     their projections are stored as they are used
    14 query heads on 8 devices  each device has two, the last one none, which are zeros; the projections are stored in
                                 eight parts, of 1 3/4 heads, and gathered over `tensor` too
    2 kv heads on 8 devices      each device has those that its query heads read: one; the projections are gathered
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.params import PARAM_AXES, param_spec
from r3rag_jax.parallel.blocks import Blocks
from r3rag_jax.parallel.collectives import (
    TENSOR,
    Dims,
    gather,
    mesh_axes,
    shared_over_tensor,
    split_dims,
    sum_over_tensor,
)
from r3rag_jax.parallel.target import Target

_SPLIT = ("heads", "kv_heads", "mlp")  # logical axes that `tensor` splits inside a layer


def config_of_shard(config: DecoderConfig, target: Target) -> DecoderConfig:
    """The decoder's config with the numbers of heads that one device has."""
    ways = target.ways(TENSOR)
    num_heads, group = -(-config.num_heads // ways), config.num_heads // config.num_kv_heads
    if config.num_heads % ways == 0 and config.num_kv_heads % ways == 0:
        num_kv_heads = config.num_kv_heads // ways
    else:
        num_kv_heads = 1 if group % num_heads == 0 else num_heads  # of one group, or one for each query head
    return dataclasses.replace(config, num_heads=num_heads, num_kv_heads=num_kv_heads)


def layer_of_shard(
    config: DecoderConfig, w: dict[str, jax.Array], dtype: jax.typing.DTypeLike, target: Target
) -> dict[str, jax.Array]:
    """A layer's parameters as one device uses them, from those that it stores; matrices are cast to `dtype`."""
    if not target.is_shard:
        return w
    return {name: _of_shard(config, name, value, dtype, target) for name, value in w.items()}


def _of_shard(
    config: DecoderConfig, name: str, value: jax.Array, dtype: jax.typing.DTypeLike, target: Target
) -> jax.Array:
    axes, spec = PARAM_AXES[name][1:], param_spec(_mesh(target), config, name)[1:]
    dtype = dtype if name.endswith("_proj") else value.dtype
    split = next((dim for dim, axis in enumerate(axes) if axis in _SPLIT), None)
    if split is None and name not in ("input_norm", "post_norm"):  # these two act on copies, others on a device's part
        value = shared_over_tensor(value, target)
    if split is None or _is_used_as_stored(config, axes[split], target):
        return gather(value, split_dims(spec, ("fsdp",), target), dtype, value.dtype)
    if spec[split] is None:  # stored whole
        value = shared_over_tensor(value, target)
    whole = gather(value, split_dims(spec, ("fsdp", TENSOR), target), dtype, value.dtype)
    return _select(config, axes[split], whole, split, target)


def _is_used_as_stored(config: DecoderConfig, axis: str | None, target: Target) -> bool:
    sizes = {"heads": [config.num_heads], "kv_heads": [config.num_heads, config.num_kv_heads], "mlp": [config.ffn_size]}
    return all(size % target.ways(TENSOR) == 0 for size in sizes[str(axis)])


def _select(config: DecoderConfig, axis: str | None, value: jax.Array, dim: int, target: Target) -> jax.Array:
    """This device's heads, or columns of the feed-forward layer, of a whole parameter; zeros where there are none."""
    ways, rank = target.ways(TENSOR), lax.axis_index(TENSOR)
    shard = config_of_shard(config, target)
    if axis == "kv_heads":
        group = config.num_heads // config.num_kv_heads
        heads = jnp.minimum(rank * shard.num_heads + jnp.arange(shard.num_kv_heads), config.num_heads - 1) // group
        by_head = jnp.moveaxis(value, dim, 0).reshape(config.num_kv_heads, config.head_dim, -1)
        rest = value.shape[:dim] + value.shape[dim + 1 :]
        return jnp.moveaxis(by_head[heads].reshape(-1, *rest), 0, dim)
    size = shard.num_heads * config.head_dim if axis == "heads" else -(-config.ffn_size // ways)
    missing = [(0, size * ways - value.shape[dim] if d == dim else 0) for d in range(value.ndim)]
    return lax.dynamic_slice_in_dim(jnp.pad(value, missing), rank * size, size, axis=dim)


def whole_of_shard(
    config: DecoderConfig,
    name: str,
    value: jax.Array,
    dtype: jax.typing.DTypeLike,
    target: Target,
    *,
    is_used_alike: bool = False,
) -> jax.Array:
    """A parameter outside the layers, whole.

    Args:
        is_used_alike: whether all devices of `tensor` use it for the same tokens, rather than for tokens of their own.
    """
    if not target.is_shard:
        return value
    shared, split = output_of_shard(config, name, value, target)
    return gather(value if is_used_alike else shared, split, dtype, value.dtype)


def output_of_shard(config: DecoderConfig, name: str, value: jax.Array, target: Target) -> tuple[jax.Array, Dims]:
    """A parameter that each device uses for tokens of its own, as it is stored, and the dimensions to gather."""
    spec = param_spec(_mesh(target), config, name)
    if not any(TENSOR in mesh_axes(entry) for entry in spec):
        value = shared_over_tensor(value, target)
    return value, split_dims(spec, ("fsdp", TENSOR), target)


def embeddings_of_shard(
    config: DecoderConfig, table: jax.Array, tokens_BL: jax.Array, dtype: jax.typing.DTypeLike, target: Target
) -> jax.Array:
    """The embeddings [B, L, D] of a device's tokens, from its shard of the table.

    Each device of `tensor` looks up the tokens whose embeddings it has.
    """
    spec = param_spec(_mesh(target), config, "embed")
    blocks = Blocks.of(table.shape, 0, split_dims(spec, ("fsdp",), target), target)
    if spec[0] is None:
        return _look_up(table, tokens_BL, blocks, dtype)
    return sum_over_tensor(_look_up(table, tokens_BL - lax.axis_index(TENSOR) * len(table), blocks, dtype), target)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(table: jax.Array, index_BL: jax.Array, blocks: Blocks, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Look rows up in a table that is gathered in blocks of `dtype`; zeros where an index is out of range.

    The gradient is summed in float32, a block after the other.
    """

    def of_block(x: jax.Array, number: Any) -> tuple[jax.Array, None]:
        block = blocks.gather(table, number, dtype)
        return x + block.at[blocks.positions(index_BL, number)].get(mode="fill", fill_value=0), None

    width = blocks.whole_shape(table.shape)[1]
    return blocks.scan(of_block, jnp.zeros((*index_BL.shape, width), dtype))[0]


def _look_up_forward(
    table: jax.Array, index_BL: jax.Array, blocks: Blocks, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _look_up(table, index_BL, blocks, dtype), (table, index_BL)


def _look_up_backward(
    blocks: Blocks, dtype: jax.typing.DTypeLike, saved: tuple[jax.Array, jax.Array], grad_BLD: jax.Array
) -> tuple[jax.Array, None]:
    table, index_BL = saved

    def of_block(_: None, number: Any) -> tuple[None, jax.Array]:
        grad = jnp.zeros((blocks.width, grad_BLD.shape[-1]), jnp.float32)
        index = blocks.positions(index_BL, number)
        return None, blocks.scatter(grad.at[index].add(grad_BLD.astype(jnp.float32), mode="drop"))

    return blocks.join(blocks.scan(of_block, None)[1]).astype(table.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _mesh(target: Target) -> jax.sharding.AbstractMesh:
    assert target.mesh is not None
    return target.mesh

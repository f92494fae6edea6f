"""Programs that are written for one device, whose collectives are explicit, and the gradients of these collectives.

XLA's partitioner decides by itself where a program for the whole mesh communicates: it gathered the output matrix in
each chunk of the loss, reduced whole gradients on all devices, and moved activations between shardings. Under
`per_device` nothing is communicated but what stands here.

What a device holds of a value is one of three:

    shard    its part of the value
    copy     the whole value, equal on all devices of an axis; so is the gradient
    partial  a term of the value, which is the sum over the devices of an axis

A gradient of a parameter is partial over (data, fsdp), since each device has rows of its own. Over `tensor` all devices
have the same rows, and activations between layers are copies (arXiv 1909.08053).

All functions do nothing unless the target is a shard and the axis has several devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from r3rag_jax.parallel.shardings import RULES
from r3rag_jax.parallel.target import Target

TENSOR = "tensor"
Dims = tuple[tuple[int, tuple[str, ...]], ...]  # (dimension, the mesh axes it is split over), …


# XLA's TPU backend runs gathers beside other work by default, but waits for sums. On v5e 8x8, where it writes the
# reduce-scatter of a layer's gradient as an all-reduce, sums are half of an update's communication.
_ASYNC_SUMS = {
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


def compiler_options(target: Target) -> dict[str, str] | None:
    """Options of XLA, for `jax.jit`, with which sums of gradients run beside the backward pass."""
    return dict(_ASYNC_SUMS) if target.platform == "tpu" and not target.is_one_device else None


def per_device(mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` on each device's shards of its arguments; on one device, `function` itself.

    Args:
        in_specs, out_specs: PartitionSpecs, as of `jax.shard_map`. What an output's spec does not name must be equal
            on the devices of that axis.
    """
    if mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec, which may hold a single one without its tuple."""
    return (entry,) if isinstance(entry, str) else entry or ()


def split_dims(spec: Iterable[Any], axes: tuple[str, ...], target: Target) -> Dims:
    """The dimensions that `spec` splits over one of `axes`, where that axis has several devices."""
    dims = ((dim, mesh_axes(entry)) for dim, entry in enumerate(spec))
    return tuple((dim, names) for dim, names in dims if any(a in axes and target.ways(a) > 1 for a in names))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(x: jax.Array, dims: Dims, dtype: Any, param_dtype: Any) -> jax.Array:
    """Gather a parameter of `param_dtype`, cast to `dtype` before it is sent.

    The gradient, which is partial, is summed in float32, and each device receives its shard of the sum.
    """
    x = x.astype(dtype)
    for dim, axes in dims:
        x = lax.all_gather(x, axes, axis=dim, tiled=True)
    return x


def _gather_forward(x: jax.Array, dims: Dims, dtype: Any, param_dtype: Any) -> tuple[jax.Array, None]:
    return gather(x, dims, dtype, param_dtype), None


def _gather_backward(dims: Dims, dtype: Any, param_dtype: Any, _: None, grad: jax.Array) -> tuple[jax.Array]:
    return (scatter(grad, dims).astype(param_dtype),)


def scatter(grad: jax.Array, dims: Dims) -> jax.Array:
    """Sum a partial gradient over the devices, in float32; each receives its shard of the sum.

    Where XLA's TPU backend does not reduce-scatter over a plane of the torus (v5e 8x8), it sums all on all devices and
    slices the sum. The barrier keeps it from slicing where the shard is used, in the optimizer, until which the whole
    sum would live.
    """
    for dim, axes in dims:
        grad = lax.psum_scatter(grad.astype(jnp.float32), axes, scatter_dimension=dim, tiled=True)
    return lax.optimization_barrier(grad) if dims else grad


gather.defvjp(_gather_forward, _gather_backward)


def sum_over_batch(tree: Any, target: Target) -> Any:
    """Partial -> copy, over (data, fsdp); not differentiable."""
    axes = tuple(axis for axis in RULES["batch"] if target.ways(axis) > 1)
    return lax.psum(tree, axes) if axes else tree


def max_over_batch(x: jax.Array, target: Target) -> jax.Array:
    """The largest of the devices' values; not differentiable."""
    axes = tuple(axis for axis in RULES["batch"] if target.ways(axis) > 1)
    return lax.pmax(x, axes) if axes else x


def sum_gradients(grads: Any, specs: Any, target: Target) -> Any:
    """Sum gradients over those axes of (data, fsdp) that their parameters are not split over: `gather` did the rest."""

    def one(grad: jax.Array, spec: PartitionSpec) -> jax.Array:
        split = {axis for entry in spec for axis in mesh_axes(entry)}
        axes = tuple(axis for axis in RULES["batch"] if target.ways(axis) > 1 and axis not in split)
        return lax.psum(grad, axes) if axes else grad

    return jax.tree.map(one, grads, specs)


def shared_over_tensor(x: jax.Array, target: Target) -> jax.Array:
    """A copy, of which each device uses a part: the gradient is partial, and is summed over `tensor`."""
    return _shared(x) if target.ways(TENSOR) > 1 else x


def sum_over_tensor(x: jax.Array, target: Target) -> jax.Array:
    """Partial -> copy, over `tensor`; the gradient is a copy."""
    return _summed(x) if target.ways(TENSOR) > 1 else x


def split_over_tensor(x: jax.Array, target: Target) -> jax.Array:
    """A copy [B, L, ...] -> this device's columns [B, L / ways, ...], every `ways`-th; `ways` divides L."""
    return _split(x, target.ways(TENSOR)) if target.ways(TENSOR) > 1 else x


def join_over_tensor(x: jax.Array, target: Target) -> jax.Array:
    """Undo `split_over_tensor`."""
    return _join(x, target.ways(TENSOR)) if target.ways(TENSOR) > 1 else x


@jax.custom_vjp
def _shared(x: jax.Array) -> jax.Array:
    return x


_shared.defvjp(lambda x: (x, None), lambda _, grad: (lax.psum(grad, TENSOR),))


@jax.custom_vjp
def _summed(x: jax.Array) -> jax.Array:
    return lax.psum(x, TENSOR)


_summed.defvjp(lambda x: (_summed(x), None), lambda _, grad: (grad,))


def _column(x: jax.Array, ways: int) -> jax.Array:
    B, L = x.shape[:2]
    x = x.reshape(B, L // ways, ways, *x.shape[2:])
    return lax.dynamic_index_in_dim(x, lax.axis_index(TENSOR), axis=2, keepdims=False)


def _all_columns(x: jax.Array, ways: int) -> jax.Array:
    x = lax.all_gather(x, TENSOR, axis=2)
    return x.reshape(x.shape[0], x.shape[1] * ways, *x.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _split(x: jax.Array, ways: int) -> jax.Array:
    return _column(x, ways)


_split.defvjp(lambda x, ways: (_column(x, ways), None), lambda ways, _, grad: (_all_columns(grad, ways),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _join(x: jax.Array, ways: int) -> jax.Array:
    return _all_columns(x, ways)


_join.defvjp(lambda x, ways: (_all_columns(x, ways), None), lambda ways, _, grad: (_column(grad, ways),))

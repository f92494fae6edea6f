"""Matmuls of activations and weights with float32 accumulation, and backward passes that are fast on CPUs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from r3rag_jax.parallel.target import Target


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., in] @ w [in, out], accumulated in float32; returns the dtype of x."""
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def needs_row_major(dtype: jax.typing.DTypeLike, target: Target) -> bool:
    """Whether both factors of a matmul should be row-major in memory.

    XLA's CPU backend converts a transposed bfloat16 factor to float32 first, which halves the speed.
    """
    return jnp.dtype(dtype) == jnp.bfloat16 and target.is_cpu


def transpose_copy(x: jax.Array, target: Target) -> jax.Array:
    """Transpose [..., A, Z] to [..., Z, A] for use in a matmul; makes a row-major copy if `needs_row_major`.

    The copy is flattened to one axis, because XLA chooses the layout of arrays with more axes and would keep the
    original one.
    """
    x_ZA = jnp.swapaxes(x, -1, -2)
    if not needs_row_major(x.dtype, target):
        return x_ZA
    return jax.lax.optimization_barrier(x_ZA.reshape(-1)).reshape(x_ZA.shape)


def matmul(x: jax.Array, w: jax.Array, target: Target) -> jax.Array:
    """`product` with a custom backward pass on one device.

    On several devices the backward pass is autodiff's, which XLA's partitioner shards well.
    """
    return _matmul(target, x, w) if target.is_one_device else product(x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(target: Target, x: jax.Array, w: jax.Array) -> jax.Array:
    return product(x, w)


def _forward(target: Target, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, w), (x, w)


def _backward(target: Target, saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    return product(grad, transpose_copy(w, target)), _sum_over_tokens(x, grad, target)


_matmul.defvjp(_forward, _backward)


def adapted_matmul(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, target: Target) -> jax.Array:
    """x @ (w + a @ b) for x [..., in], w [in, out], a [in, rank], b [rank, out], as x @ w + (x @ a) @ b.

    (arXiv 2106.09685)
    """
    return _adapted_matmul(target, x, w, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adapted_matmul(target: Target, x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return _adapted_forward(target, x, w, a, b)[0]


def _adapted_forward(
    target: Target, x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    xa = product(x, a)
    return product(x, w) + product(xa, b), (x, w, a, b, xa)


def _adapted_backward(target: Target, saved: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, ...]:
    x, w, a, b, xa = saved
    grad_xa = product(grad, transpose_copy(b, target))
    grad_x = product(grad, transpose_copy(w, target)) + product(grad_xa, transpose_copy(a, target))
    sums = ((x, grad), (x, grad_xa), (xa, grad))
    return grad_x, *(_sum_over_tokens(left, right, target) for left, right in sums)


_adapted_matmul.defvjp(_adapted_forward, _adapted_backward)


def _sum_over_tokens(x: jax.Array, y: jax.Array, target: Target) -> jax.Array:
    """Sum the outer products of [..., A] and [..., Z] over all tokens: [A, Z].

    XLA's CPU backend transposes the left factor, so the narrower factor is put on the left. If factors must be
    row-major, so must the result, and x stays on the left.
    """
    x_TA, y_TZ = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    if needs_row_major(x.dtype, target) or x.shape[-1] <= y.shape[-1]:
        return product(transpose_copy(x_TA, target), y_TZ)
    return product(y_TZ.T, x_TA).T

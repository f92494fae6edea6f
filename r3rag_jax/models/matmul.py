"""Products of activations and weights: float32 sums, the inputs' dtype, and backward passes that a CPU is fast at."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from r3rag_jax.parallel.mesh import on_several_devices, platform


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply [..., in] by [in, out], accumulating in float32, and return the dtype of x."""
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def wants_as_it_lies(dtype: jax.typing.DTypeLike) -> bool:
    """Whether no factor of a product should be turned: in bfloat16 XLA's CPU backend widens it, at half the speed."""
    return jnp.dtype(dtype) == jnp.bfloat16 and platform() == "cpu"


def turned(x: jax.Array) -> jax.Array:
    """[..., A, Z] -> [..., Z, A], as a factor of a product; written anew where it has to lie so.

    (By way of one axis, for the layout of two is XLA's own choice, and it would choose the old one.)
    """
    x_ZA = jnp.swapaxes(x, -1, -2)
    if not wants_as_it_lies(x.dtype):
        return x_ZA
    return jax.lax.optimization_barrier(x_ZA.reshape(-1)).reshape(x_ZA.shape)


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`product`, whose backward pass is this module's.

    On a mesh of several devices it is autodiff's, whose layout the partitioner knows.
    """
    return product(x, w) if on_several_devices() else _matmul(x, w)


@jax.custom_vjp
def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    return product(x, w)


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, w), (x, w)


def _backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    return product(grad, turned(w)), _over_tokens(x, grad)


_matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def adapted_matmul(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply [..., in] by w [in, out] + a [in, rank] b [rank, out], which is never formed."""
    return _adapted_forward(x, w, a, b)[0]


def _adapted_forward(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    xa = product(x, a)
    return product(x, w) + product(xa, b), (x, w, a, b, xa)


def _adapted_backward(saved: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, ...]:
    x, w, a, b, xa = saved
    grad_xa = product(grad, turned(b))
    grad_x = product(grad, turned(w)) + product(grad_xa, turned(a))
    return grad_x, _over_tokens(x, grad), _over_tokens(x, grad_xa), _over_tokens(xa, grad)


adapted_matmul.defvjp(_adapted_forward, _adapted_backward)


def _over_tokens(x: jax.Array, y: jax.Array) -> jax.Array:
    """[..., A] and [..., Z] -> their products summed over all tokens, [A, Z].

    The narrow factor comes first: XLA's CPU backend turns that one, and as autodiff writes it that is the gradient,
    often the wide one. Where factors have to lie as they are, so has the product: x comes first.
    """
    x_TA, y_TZ = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    if wants_as_it_lies(x.dtype) or x.shape[-1] <= y.shape[-1]:
        return product(turned(x_TA), y_TZ)
    return product(y_TZ.T, x_TA).T

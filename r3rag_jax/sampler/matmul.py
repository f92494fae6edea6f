"""Products of a decode step: few rows of activations with weight matrices [out, in]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from r3rag_jax.models.matmul import wants_as_it_lies
from r3rag_jax.parallel.mesh import platform
from r3rag_jax.sampler.kernels.cpu import operations as cpu_kernels


def by_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    """Products of [..., in] with the rows of w [out, in], float32 [..., out].

    XLA's CPU backend packs the right factor anew in every call, and for a decode step that is to copy all weights: so
    there a kernel of our own is called, or they stand on the left. One row alone is taken twice where all of a bfloat16
    matrix would be widened for it.
    """
    rows = x.reshape(-1, x.shape[-1])
    num_rows = len(rows)
    if cpu_kernels.can_multiply(rows, w):
        out = cpu_kernels.multiply(rows, w)
    elif platform() == "cpu" and x.dtype == jnp.float32 and num_rows in WEIGHTS_FIRST:
        out = jax.lax.optimization_barrier(_by_rows(w, rows)).T  # else XLA turns the factors around again
    elif num_rows == 1 and wants_as_it_lies(x.dtype):
        out = _by_rows(jnp.broadcast_to(rows, (2, x.shape[-1])), w)[:1]
    else:
        out = _by_rows(rows, w)
    return out.reshape(*x.shape[:-1], len(w))


def _by_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """[A, in] and [B, in] -> [A, B]."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


WEIGHTS_FIRST = range(2, 33)  # rows of x for which a CPU is faster with float32 weights as the left factor

"""The operations of a decode step whose form depends on the devices: products of few rows, embedding look-ups."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r3rag_jax.models.matmul import needs_row_major
from r3rag_jax.parallel.target import ONE_CPU, Target
from r3rag_jax.sampler.kernels.cpu.kernels import CPUKernels, load_kernels

WEIGHTS_FIRST = range(2, 33)  # rows of x for which a CPU is faster with float32 weights as the left factor


@dataclasses.dataclass(frozen=True)
class SamplerOps:
    """Chosen once per mesh; static in jitted functions."""

    target: Target = ONE_CPU
    kernels: CPUKernels | None = None

    @classmethod
    def of(cls, mesh: Mesh) -> SamplerOps:
        """The operations for these devices, with the CPU kernels where they can be had."""
        target = Target.of(mesh)
        return cls(target, load_kernels(target))

    def multiply(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """Multiply [..., in] with the rows of w [out, in]; float32 [..., out].

        XLA's CPU backend packs the right factor in every call, which in a decode step copies all weights. There a
        kernel is called, or the weights stand on the left. A single row is taken twice where XLA would widen a whole
        bfloat16 matrix for it.
        """
        rows = x.reshape(-1, x.shape[-1])
        num_rows = len(rows)
        if self.kernels is not None and self.kernels.can_multiply(rows, w):
            out = self.kernels.multiply(rows, w)
        elif self.target.is_cpu and x.dtype == jnp.float32 and num_rows in WEIGHTS_FIRST:
            out = jax.lax.optimization_barrier(_product(w, rows)).T  # without it XLA swaps the factors back
        elif num_rows == 1 and needs_row_major(x.dtype, self.target):
            out = _product(jnp.broadcast_to(rows, (2, x.shape[-1])), w)[:1]
        else:
            out = _product(rows, w)
        return out.reshape(*x.shape[:-1], len(w))

    def embed(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """Look up table[ids].

        On a CPU the bits of a bfloat16 table are copied: XLA would widen the whole table in every call. The barrier
        keeps it from copying all the bits before a decode loop.
        """
        if table.dtype != jnp.bfloat16 or not self.target.is_cpu:
            return table[ids]
        table, ids = jax.lax.optimization_barrier((table, ids))
        return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(table, jnp.uint16)[ids], table.dtype)


XLA_ON_ONE_CPU = SamplerOps()


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply [A, in] and [B, in] to [A, B]."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

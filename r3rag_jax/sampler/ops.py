"""Operations of a decode step that are implemented per platform: matmuls of few rows, embedding look-ups."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r3rag_jax.models.matmul import needs_row_major
from r3rag_jax.parallel.target import ONE_CPU, Target
from r3rag_jax.sampler.kernels.cpu.kernels import CPUKernels, load_kernels

WEIGHTS_FIRST = range(
    2, 33
)  # numbers of rows of x for which XLA on a CPU is faster at w @ x.T than at x @ w.T, in float32


@dataclasses.dataclass(frozen=True)
class SamplerOps:
    """The operations for one mesh; chosen once and static in jitted functions."""

    target: Target = ONE_CPU
    kernels: CPUKernels | None = None

    @classmethod
    def of(cls, mesh: Mesh) -> SamplerOps:
        """Choose the operations for a mesh; with the CPU kernels if they can be loaded."""
        target = Target.of(mesh)
        return cls(target, load_kernels(target))

    def multiply(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """Return x @ w.T in float32, [..., out], for x [..., in] and w [out, in].

        XLA's CPU backend packs the right factor in every call, which copies all weights in each decode step. To avoid
        this, CPUs use a kernel or put the weights on the left. A single row is duplicated where XLA would otherwise
        convert a whole bfloat16 matrix to float32.
        """
        rows = x.reshape(-1, x.shape[-1])
        num_rows = len(rows)
        if self.kernels is not None and self.kernels.can_multiply(rows, w):
            out = self.kernels.multiply(rows, w)
        elif self.target.is_cpu and x.dtype == jnp.float32 and num_rows in WEIGHTS_FIRST:
            out = jax.lax.optimization_barrier(_product(w, rows)).T  # without the barrier XLA swaps the factors back
        elif num_rows == 1 and needs_row_major(x.dtype, self.target):
            out = _product(jnp.broadcast_to(rows, (2, x.shape[-1])), w)[:1]
        else:
            out = _product(rows, w)
        return out.reshape(*x.shape[:-1], len(w))

    @property
    def is_input_major(self) -> bool:
        """Whether matrices that are split by their inputs are stored as [in, out], see `CachedDecoder`."""
        return not (self.target.is_cpu and self.target.is_one_device)

    def input_major(self, w: jax.Array) -> jax.Array:
        """Convert a matrix [in, out] to the layout that `multiply_inputs` takes."""
        return w if self.is_input_major else w.T

    def multiply_inputs(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """Return x [..., in] times a matrix from `input_major` in float32, [..., out]."""
        if not self.is_input_major:
            return self.multiply(x, w)
        return jnp.matmul(x, w, preferred_element_type=jnp.float32)

    def embed(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """Return table[ids], [..., D], for table [V, D] and ids int [...].

        On a CPU, XLA would convert a whole bfloat16 table to float32 in every call, so its bits are looked up as
        uint16. The barrier keeps XLA from moving a bitcast copy of the whole table in front of the decode loop.
        """
        if table.dtype != jnp.bfloat16 or not self.target.is_cpu:
            return table[ids]
        table, ids = jax.lax.optimization_barrier((table, ids))
        return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(table, jnp.uint16)[ids], table.dtype)


XLA_ON_ONE_CPU = SamplerOps()


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x [A, in] @ y.T [in, B] -> float32 [A, B]."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

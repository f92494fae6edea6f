"""The KV cache layout of the CPU kernels, which read and write it in place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from r3rag_jax.sampler.cache.base import Extent, LayerCache
from r3rag_jax.sampler.kernels.cpu.kernels import CPUKernels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelLayerCache(LayerCache):
    """A float32 or bfloat16 cache with keys in blocks of KEY_BLOCK positions."""

    kernels: CPUKernels = dataclasses.field(metadata={"static": True})

    @property
    def is_read_in_place(self) -> bool:
        return True

    def write(
        self, k_BCKH: jax.Array, v_BCKH: jax.Array, positions_BC: jax.Array, rows_B: jax.Array | None = None
    ) -> KernelLayerCache:
        """See `LayerCache.write`."""
        rows_B = jnp.arange(len(positions_BC)) if rows_B is None else rows_B
        k, v = self.kernels.write(self.k, self.v, k_BCKH, v_BCKH, positions_BC, rows_B)
        return dataclasses.replace(self, k=k, v=v)

    def attend(
        self,
        q_BCNH: jax.Array,
        positions_BC: jax.Array,
        rows_B: jax.Array | None = None,
        extent: Extent | None = None,
    ) -> jax.Array:
        """See `LayerCache.attend`. `extent` is not used: the kernel reads each row up to its last query's position."""
        rows_B = jnp.arange(len(q_BCNH)) if rows_B is None else rows_B
        return self.kernels.attend(q_BCNH, self.k, self.v, positions_BC, rows_B)

"""C++ kernels of the sampler on one CPU device: attention to the cache, writing into it, products of few rows.

XLA's CPU backend packs a factor of a product in every call (over half of a bfloat16 decode step copies weights), reads
as many positions of every row as of the longest, and rewrites a bfloat16 cache to change one position. Without a C++
compiler and on several devices XLA's own operations do the same.

Shapes: as in `sampler/cache/`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from r3rag_jax.parallel.target import Target
from r3rag_jax.sampler.kernels.cpu import build
from r3rag_jax.sampler.kernels.cpu.build import HEAD_MULTIPLE, PRODUCT_MULTIPLE

DTYPES = (jnp.float32, jnp.bfloat16)
MAX_PRODUCT_ROWS = 256  # rows of a product up to which `multiply` is faster than XLA (measured)


@dataclasses.dataclass(frozen=True)
class CPUKernels:
    """The compiled operations of one build; static in jitted functions."""

    build: str  # part of the operations' names for XLA, which keeps compiled programs between runs

    def can_attend(self, head_dim: int, dtype: jax.typing.DTypeLike) -> bool:
        """Whether `attend` and `write` take a cache of such heads, its keys in blocks of KEY_BLOCK positions."""
        return head_dim % HEAD_MULTIPLE == 0 and jnp.dtype(dtype) in DTYPES

    def can_multiply(self, x: jax.Array, w: jax.Array) -> bool:
        """Whether `multiply` takes these factors and is faster than XLA."""
        is_supported = x.dtype == w.dtype and x.dtype in DTYPES and x.shape[1] % PRODUCT_MULTIPLE == 0
        return is_supported and len(x) <= MAX_PRODUCT_ROWS

    def attend(
        self, q_BCNH: jax.Array, k: jax.Array, v: jax.Array, positions_BC: jax.Array, rows_B: jax.Array
    ) -> jax.Array:
        """Attend to a cache's positions up to each query's own; [B, C, N, H] of the queries' dtype, summed in float32.

        Args:
            q_BCNH: float32 or bfloat16.
            k: [rows, K, S / KEY_BLOCK, H, KEY_BLOCK]. v: [rows, K, S, H]. Both float32 or both bfloat16.
            rows_B: int32, the cache row that each row of queries reads; out-of-range rows give zeros.
        """
        out = jax.ShapeDtypeStruct(q_BCNH.shape, q_BCNH.dtype)
        return self._call("attend", out, q_BCNH, k, v, *_integers(positions_BC, rows_B))

    def write(
        self,
        k: jax.Array,
        v: jax.Array,
        k_BCKH: jax.Array,
        v_BCKH: jax.Array,
        positions_BC: jax.Array,
        rows_B: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Write new keys and values at positions of rows into a cache as `attend` reads it; in place if donated.

        Positions >= S and out-of-range rows are not written.
        """
        new = k_BCKH.astype(k.dtype), v_BCKH.astype(v.dtype), *_integers(positions_BC, rows_B)
        outs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v))
        return self._call("write_new", outs, *new, k, v, input_output_aliases={4: 0, 5: 1})

    def multiply(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """Multiply [R, in] with the rows of [out, in], both float32 or both bfloat16; float32 [R, out]."""
        return self._call("multiply", jax.ShapeDtypeStruct((len(x), len(w)), jnp.float32), x, w)

    def _call(self, operation: str, outs: Any, *args: jax.Array, **options: Any) -> Any:
        return jax.ffi.ffi_call(build.operation_name(operation, self.build), outs, vmap_method="sequential", **options)(
            *args
        )


def load_kernels(target: Target) -> CPUKernels | None:
    """The kernels for these devices: None but on one CPU device, and where no C++ compiler works."""
    name = build.build_name() if target.is_cpu and target.is_one_device else None
    return None if name is None else CPUKernels(name)


def are_missing(target: Target) -> bool:
    """Whether these devices could use the kernels, but no C++ compiler works."""
    return target.is_cpu and target.is_one_device and build.build_name() is None


def _integers(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x.astype(jnp.int32) for x in arrays)

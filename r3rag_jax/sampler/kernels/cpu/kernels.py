"""C++ kernels of the sampler for one CPU device: attention over the cache, cache updates, matmuls of few rows.

They avoid three costs of XLA's CPU backend: it packs one factor of a matmul in every call (more than half of a bfloat16
decode step is copies of weights), it reads as many positions of every row as the longest row has, and it rewrites a
whole bfloat16 cache to change one position. Without a C++ compiler, or on several devices, the sampler uses XLA's
operations instead.

Shapes: see `sampler/cache/base.py`.
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
MAX_PRODUCT_ROWS = 256  # `multiply` is faster than XLA up to this number of rows of x (measured)


@dataclasses.dataclass(frozen=True)
class CPUKernels:
    """The operations of one compiled library; static in jitted functions."""

    build: str  # name of the library; XLA caches compiled programs between runs, so operation names contain it

    def can_attend(self, head_dim: int, dtype: jax.typing.DTypeLike) -> bool:
        """Whether `attend` and `write` support a cache with this head dimension and dtype."""
        return head_dim % HEAD_MULTIPLE == 0 and jnp.dtype(dtype) in DTYPES

    def can_multiply(self, x: jax.Array, w: jax.Array) -> bool:
        """Whether `multiply` supports x [R, in] and w [out, in] and is faster than XLA."""
        is_supported = x.dtype == w.dtype and x.dtype in DTYPES and x.shape[1] % PRODUCT_MULTIPLE == 0
        return is_supported and len(x) <= MAX_PRODUCT_ROWS

    def attend(
        self, q_BCNH: jax.Array, k: jax.Array, v: jax.Array, positions_BC: jax.Array, rows_B: jax.Array
    ) -> jax.Array:
        """Attend causally to the cache; returns [B, C, N, H] in the queries' dtype, accumulated in float32.

        Args:
            q_BCNH: queries, float32 or bfloat16.
            k: cached keys [rows, K, S / KEY_BLOCK, H, KEY_BLOCK], float32 or bfloat16.
            v: cached values [rows, K, S, H] of the keys' dtype.
            positions_BC: int, a query sees the cache positions up to its own.
            rows_B: int, the cache row of each row of queries; out-of-range rows give zeros.
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
        """Write new keys and values into a cache (k, v: see `attend`) and return it; in place if it is donated.

        Row b's token c is written at positions_BC[b, c] of cache row rows_B[b]. Positions >= S and out-of-range rows
        are not written.
        """
        new = k_BCKH.astype(k.dtype), v_BCKH.astype(v.dtype), *_integers(positions_BC, rows_B)
        outs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v))
        return self._call("write_new", outs, *new, k, v, input_output_aliases={4: 0, 5: 1})

    def multiply(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """x [R, in] @ w.T, w [out, in], both float32 or both bfloat16 -> float32 [R, out]."""
        return self._call("multiply", jax.ShapeDtypeStruct((len(x), len(w)), jnp.float32), x, w)

    def _call(self, operation: str, outs: Any, *args: jax.Array, **options: Any) -> Any:
        return jax.ffi.ffi_call(build.operation_name(operation, self.build), outs, vmap_method="sequential", **options)(
            *args
        )


def load_kernels(target: Target) -> CPUKernels | None:
    """Compile or load the kernels; None unless the target is one CPU device and a C++ compiler works."""
    name = build.build_name() if target.is_cpu and target.is_one_device else None
    return None if name is None else CPUKernels(name)


def are_missing(target: Target) -> bool:
    """Whether the target could use the kernels but no C++ compiler works."""
    return target.is_cpu and target.is_one_device and build.build_name() is None


def _integers(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x.astype(jnp.int32) for x in arrays)

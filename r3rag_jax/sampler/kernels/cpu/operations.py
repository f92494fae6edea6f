"""What the sampler does most on a CPU, in C++: attention to a cache, writing into it, products of up to 256 rows.

XLA's CPU backend packs a factor of a product in every call (over half a decode step in bfloat16 is copies of weights),
reads of all rows as many positions as of the longest, and writes a bfloat16 cache anew for one position.
`kernels.cc` is compiled for the machine at its first use, by the compiler that $CXX names or c++, g++ or clang++,
and kept in the user's cache directory. Where there is none (`CXX=` says so, too), and on several devices, XLA's own
operations do the same.

Shapes: as in `cache.py`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform as host
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from r3rag_jax.parallel.mesh import on_several_devices, platform
from r3rag_jax.run.caches import cache_directory

SOURCE = Path(__file__).with_name("kernels.cc")
COMPILERS = ("c++", "g++", "clang++")
OPTIONS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared")
OPERATIONS = ("attend", "write_new", "multiply")
DTYPES = (jnp.float32, jnp.bfloat16)
WIDTH = 32  # what the length of a product's rows must be a multiple of; half of it that of a head
MOST_ROWS = 256  # of a product, up to which `multiply` is the faster (measured)


def are_missing() -> bool:
    """Whether what is traced now could have them, but for a compiler."""
    return platform() == "cpu" and not on_several_devices() and _build() is None


def can_attend(head_dim: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether `attend` reads a cache of such heads, in blocks of 32 positions, in what is traced now."""
    return head_dim % (WIDTH // 2) == 0 and jnp.dtype(dtype) in DTYPES and _are_usable()


def can_multiply(x: jax.Array, w: jax.Array) -> bool:
    """Whether `multiply` takes these factors, faster than XLA, in what is traced now."""
    is_fast = x.dtype == w.dtype and x.dtype in DTYPES and len(x) <= MOST_ROWS and x.shape[1] % WIDTH == 0
    return is_fast and _are_usable()


def attend(q_BCNH: jax.Array, k: jax.Array, v: jax.Array, positions_BC: jax.Array, rows_B: jax.Array) -> jax.Array:
    """Attend to a cache's positions up to each query's own; [B, C, N, H] of the queries' type, summed in float32.

    Args:
        q_BCNH: float32 or bfloat16.
        k: [rows, K, S / 32, H, 32]. v: [rows, K, S, H]; float32 or bfloat16 both.
        rows_B: int32, the row of the cache that each row of queries reads; zeros where there is no such row.
    """
    out = jax.ShapeDtypeStruct(q_BCNH.shape, q_BCNH.dtype)
    return _call("attend", out, q_BCNH, k, v, *_integers(positions_BC, rows_B))


def write(
    k: jax.Array, v: jax.Array, k_BCKH: jax.Array, v_BCKH: jax.Array, positions_BC: jax.Array, rows_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A cache's keys and values, those of `attend`, with new ones at positions of rows; in place, if they are donated.

    Positions >= S and rows that there are not are dropped.
    """
    new = k_BCKH.astype(k.dtype), v_BCKH.astype(v.dtype), *_integers(positions_BC, rows_B)
    outs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v))
    return _call("write_new", outs, *new, k, v, input_output_aliases={4: 0, 5: 1})


def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
    """Products of [R, in] with the rows of [out, in], both float32 or both bfloat16; float32 [R, out]."""
    return _call("multiply", jax.ShapeDtypeStruct((len(x), len(w)), jnp.float32), x, w)


def _are_usable() -> bool:
    """Whether there are kernels for the devices that what is traced now runs on."""
    return platform() == "cpu" and not on_several_devices() and _build() is not None


def _integers(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x.astype(jnp.int32) for x in arrays)


def _call(operation: str, outs: Any, *args: jax.Array, **options: Any) -> Any:
    return jax.ffi.ffi_call(_name(operation, _build()), outs, vmap_method="sequential", **options)(*args)


def _name(operation: str, build: str | None) -> str:
    """Of a build's operation for XLA, which keeps compiled programs between runs."""
    return f"r3rag_{operation}_{build}"


@functools.cache
def _build() -> str | None:
    """The name of the compiled operations, registered with XLA; None where no compiler is or one fails, which warns."""
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        path = _compiled(compiler)
        _register(path)
    except (OSError, subprocess.CalledProcessError) as error:
        told = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        rule = f"{shlex.join(compiler)} must compile {SOURCE.name} for the sampler's kernels (CXX= does without them)"
        warnings.warn(f"{rule}; got {str(told).strip()}", RuntimeWarning, stacklevel=2)
        return None
    return path.stem


@functools.cache  # a name is registered once
def _register(path: Path) -> None:
    library = ctypes.CDLL(str(path))
    for operation in OPERATIONS:
        jax.ffi.register_ffi_target(_name(operation, path.stem), jax.ffi.pycapsule(library[operation]), platform="cpu")


def _compiler() -> list[str] | None:
    """The words of its command; None: there is none, or none is wanted."""
    named = os.environ.get("CXX")
    if named is not None:
        return shlex.split(named) or None
    return next(([found] for name in COMPILERS if (found := shutil.which(name))), None)


def _compiled(compiler: Sequence[str]) -> Path:
    """The shared library, compiled unless it was before for this source, compiler, machine and jaxlib."""
    native = "-mcpu=native" if host.machine() in ("arm64", "aarch64") else "-march=native"
    command = [*compiler, *OPTIONS, native, "-isystem", jax.ffi.include_dir()]
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    folder = cache_directory("kernels")
    made_of = repr([SOURCE.read_text(), command, version, jax.lib.__version__, _machine(), folder])
    path = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # another process may be at it
            out = Path(scratch) / path.name
            subprocess.run([*command, str(SOURCE), "-o", str(out)], check=True, capture_output=True, text=True)
            out.replace(path)
    return path


def _machine() -> str:
    """What `native` depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ()
    return next((line for line in lines if line.startswith(("flags", "Features"))), host.platform() + host.processor())

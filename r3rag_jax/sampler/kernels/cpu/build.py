"""Compiles `kernels.cc` for this machine at first use and registers its operations with XLA.

The compiler is $CXX if it is set, else the first of c++, g++ and clang++ that exists. The shared library is cached in
the user's cache directory. `CXX=` (empty) disables the kernels.
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

import jax

from r3rag_jax.run.caches import cache_directory

SOURCE = Path(__file__).with_name("kernels.cc")
COMPILERS = ("c++", "g++", "clang++")
OPTIONS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared")
OPERATIONS = ("attend", "write_new", "multiply")
KEY_BLOCK = 32  # positions per block of cached keys
PRODUCT_MULTIPLE = 32  # the inner dimension of `multiply` must be a multiple of this
HEAD_MULTIPLE = 16  # the head dimension must be a multiple of this
SIZES = {"KEY_BLOCK": KEY_BLOCK, "PRODUCT_MULTIPLE": PRODUCT_MULTIPLE, "HEAD_MULTIPLE": HEAD_MULTIPLE}


def operation_name(operation: str, build: str) -> str:
    """The name under which an operation of a build is registered with XLA."""
    return f"r3rag_{operation}_{build}"


@functools.cache
def build_name() -> str | None:
    """Compile the kernels and register them with XLA; returns the build's name.

    Returns None if there is no compiler, or, with a RuntimeWarning, if it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        path = _compiled(compiler)
        _register(path)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        rule = f"{shlex.join(compiler)} must compile {SOURCE.name} for the sampler's kernels (CXX= does without them)"
        warnings.warn(f"{rule}; got {str(reason).strip()}", RuntimeWarning, stacklevel=2)
        return None
    return path.stem


@functools.cache  # XLA accepts each name only once
def _register(path: Path) -> None:
    library = ctypes.CDLL(str(path))
    for operation in OPERATIONS:
        jax.ffi.register_ffi_target(
            operation_name(operation, path.stem), jax.ffi.pycapsule(library[operation]), platform="cpu"
        )


def find_compiler() -> list[str] | None:
    """The compiler's command line as a list of words; None if no compiler is found or CXX is empty."""
    named = os.environ.get("CXX")
    if named is not None:
        return shlex.split(named) or None
    return next(([found] for name in COMPILERS if (found := shutil.which(name))), None)


def _compiled(compiler: Sequence[str]) -> Path:
    """Path of the shared library for this source, compiler, machine and jaxlib; compiled if it is not cached."""
    native = "-mcpu=native" if host.machine() in ("arm64", "aarch64") else "-march=native"
    sizes = [f"-D{name}={value}" for name, value in SIZES.items()]
    command = [*compiler, *OPTIONS, *sizes, native, "-isystem", jax.ffi.include_dir()]
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    folder = cache_directory("kernels")
    fingerprint = repr([SOURCE.read_text(), command, version, jax.lib.__version__, _machine(), folder])
    path = folder / f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # other processes may compile the same library
            out = Path(scratch) / path.name
            subprocess.run([*command, str(SOURCE), "-o", str(out)], check=True, capture_output=True, text=True)
            out.replace(path)
    return path


def _machine() -> str:
    """The CPU's features, on which -march=native depends."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ()
    return next((line for line in lines if line.startswith(("flags", "Features"))), host.platform() + host.processor())

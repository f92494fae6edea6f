"""Checksums that a checkpoint carries in its note: of its arrays, on whatever mesh they are, and of the note itself.

The arrays are compared after they were read, not their files: what is found is any change on the way from the devices
of the process that saved to those of the one that resumes. Files of OCDBT hold chunks without checksums of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes of an element
SMALL = 1 << 20  # bytes; a smaller array is summed on the host: a program of its own takes longer to compile
DIGEST, NOTE, ARRAYS = "digest", "note", "arrays"  # keys of a sealed note


class DamagedError(ValueError):
    """What was read is not what was written; the message completes the sentence "it is damaged: "."""


def checksums(tree: Any) -> dict[str, int]:
    """A checksum of each array of a pytree, by its path; all processes must call. Equal arrays have equal ones.

    It is the sum, modulo 2**32, of hashes of every element's bits and index. One changed element always changes it; so
    do several, but for one case in 2**32. Sums of integers do not depend on how an array is split over devices.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = jax.device_get([_of_small(x) if _is_small(x) else _of_large(x) for _, x in leaves])
    names = [jax.tree_util.keystr(key, simple=True, separator=".") for key, _ in leaves]
    return {name: int(value) for name, value in zip(names, sums, strict=True)}


def _is_small(x: jax.Array) -> bool:
    return x.nbytes < SMALL and x.is_fully_addressable


def _of_small(x: jax.Array) -> np.uint32:
    """The checksum of an array, computed on the host."""
    bits = np.asarray(x).reshape(-1)
    bits = bits.view(UNSIGNED[bits.dtype.itemsize]).astype(np.uint32)
    return np.sum(_mixed(bits ^ _mixed(np.arange(bits.size, dtype=np.uint32))), dtype=np.uint32)


@jax.jit
def _of_large(x: jax.Array) -> jax.Array:
    """The same, computed where the array is, uint32 []."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(_mixed(bits ^ _mixed(index)), dtype=jnp.uint32)


def _mixed(h: Any) -> Any:
    """MurmurHash3's finalizer, a permutation of uint32, of each element."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def sealed(note: Mapping[str, Any], arrays: Mapping[str, int]) -> dict[str, Any]:
    """A note (a JSON object) with the checksums of the arrays beside it, and a digest of both."""
    return {NOTE: dict(note), ARRAYS: dict(arrays), DIGEST: _digest(note, arrays)}


def unsealed(sealed_note: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """The note and the checksums of `sealed`; of a note that was never sealed no checksums.

    Raises:
        DamagedError: the note is not what was written.
    """
    if not isinstance(sealed_note, dict):
        raise DamagedError(f"its note must be a JSON object; got {type(sealed_note).__name__}")
    if sealed_note.keys().isdisjoint((DIGEST, NOTE, ARRAYS)):
        return sealed_note, {}
    note, arrays = sealed_note.get(NOTE), sealed_note.get(ARRAYS)
    if not isinstance(note, dict) or not isinstance(arrays, dict):
        raise DamagedError("its note must hold a note and the checksums of the arrays")
    if sealed_note.get(DIGEST) != (found := _digest(note, arrays)):
        raise DamagedError(f"its note must have SHA-256 {sealed_note.get(DIGEST)}; got {found}")
    return note, arrays


def check_arrays(tree: Any, expected: Mapping[str, int]) -> None:
    """Compare arrays with their checksums; all processes must call, and decide alike.

    Raises:
        DamagedError: an array is not what was written.
    """
    if not expected:
        return
    for name, value in checksums(tree).items():
        if value != expected.get(name):
            raise DamagedError(f"array {name} must have checksum {expected.get(name)}; got {value}")


def _digest(note: Mapping[str, Any], arrays: Mapping[str, int]) -> str:
    return hashlib.sha256(json.dumps([note, arrays], sort_keys=True).encode()).hexdigest()

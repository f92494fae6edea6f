"""Checksums of a checkpoint: the same on every mesh, another one for every change."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.run import checksums
from r3rag_jax.run.checksums import DamagedError, check_arrays, sealed, unsealed

ARRAYS = [
    jnp.arange(24.0).reshape(2, 3, 4), jnp.arange(7, dtype=jnp.bfloat16), jnp.array([True, False, True]),
    jnp.float32(3.5), jnp.zeros((0, 3)), jnp.arange(-2, 3, dtype=jnp.int8), jnp.int32(4),
]  # fmt: skip


def test_host_and_device_compute_the_same() -> None:
    assert [int(checksums._of_small(x)) for x in ARRAYS] == [int(checksums._of_large(x)) for x in ARRAYS]
    assert len(set(checksums.checksums(ARRAYS).values())) == len(ARRAYS)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
def test_a_mesh_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    expected = checksums.checksums({"x": jnp.asarray(x)})
    monkeypatch.setattr(checksums, "SMALL", 0)  # as a large array
    split = NamedSharding(make_mesh(tiny.mesh_config(2, 2, 2)), PartitionSpec("data", "tensor"))
    assert checksums.checksums({"x": jax.device_put(x, split)}) == expected
    assert list(expected) == ["x"]


def test_every_change_of_an_array_is_found() -> None:
    x = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    expected = checksums.checksums([jnp.asarray(x)])
    check_arrays([jnp.asarray(x)], expected)
    for change in ("bit", "swap", "zero"):
        other = x.copy()
        if change == "bit":
            other.view(np.uint32)[3, 4] ^= 1
        elif change == "swap":
            other[0, 0], other[8, 4] = x[8, 4], x[0, 0]
        else:
            other[2] = 0
        with pytest.raises(DamagedError, match=r"array 0 must have checksum \d+; got \d+"):
            check_arrays([jnp.asarray(other)], expected)


def test_a_note_is_what_was_written() -> None:
    note = {"kl": 0.1, "batches": {"rows": 3}, "iteration": 2}
    written = sealed(note, {"x": 7})
    assert unsealed(written) == (note, {"x": 7})
    assert unsealed(note) == (note, {})  # without checksums, nothing is compared
    changes: list[Any] = [
        written | {"note": note | {"kl": 0.2}}, written | {"arrays": {"x": 8}}, written | {"digest": ""},
        {"note": note}, written | {"note": []}, [written], None,
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(DamagedError, match="its note must"):
            unsealed(change)

"""Matrices in blocks: what is gathered, where its entries stand, and what its gradient becomes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from r3rag_jax.parallel import blocks as module
from r3rag_jax.parallel.blocks import Blocks
from r3rag_jax.parallel.collectives import compiler_options, per_device
from r3rag_jax.parallel.mesh import AXES, make_mesh
from r3rag_jax.parallel.target import ONE_CPU, Target

SPLIT = ((0, ("fsdp",)), (1, ("tensor",)))


def test_blocks_are_few_and_of_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("tpu", make_mesh(tiny.mesh_config(2, 2, 2)).abstract_mesh, is_shard=True)
    qwen = Blocks.of((3584 // 2, 152_064 // 2), 1, SPLIT, target)
    assert (qwen.num, qwen.size, qwen.width, qwen.is_even) == (9, 8448, 16_896, True)
    llama = Blocks.of((4096 // 2, 128_256 // 2), 1, SPLIT, target)
    assert (llama.num, llama.size % 128, llama.is_even) == (8, 0, False)
    assert Blocks.of((3584, 152_064), 1, (), ONE_CPU).num == 1  # nothing is gathered
    monkeypatch.setattr(module, "MAX_ELEMENTS", 10)
    assert Blocks.of((2, 3), 1, SPLIT, target).size == 1  # 24 elements in three blocks


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
@pytest.mark.parametrize("num_columns", [12, 14])  # of a shard: three blocks of 4, or of 5, 5 and 4
def test_blocks_make_up_the_matrix_and_their_gradients_its_gradient(
    num_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ELEMENTS", 8 * num_columns // 3 + 1)
    mesh = make_mesh(tiny.mesh_config(2, 2, 2))
    whole = np.arange(4 * 2 * num_columns, dtype=np.float32).reshape(4, -1)
    blocks = Blocks.of((2, num_columns), 1, SPLIT, Target.of(mesh).shard())
    assert blocks.num == 3 and blocks.is_even == (num_columns == 12)

    def on_device(shard: jax.Array) -> tuple[jax.Array, ...]:
        def of_block(_: None, index: jax.Array) -> tuple[None, tuple[jax.Array, ...]]:
            block, ids = blocks.gather(shard, index, jnp.float32), blocks.ids(index)
            position = blocks.positions(jnp.arange(whole.shape[1]), index)
            counted = jnp.where(ids >= 0, block, 0.0)
            return None, (block, ids, position, blocks.scatter(counted))

        *found, grads = blocks.scan(of_block, None)[1]
        return *found, blocks.join(grads)

    specs = P(), P(), P(), P("fsdp", "tensor")
    found = jax.jit(per_device(mesh, on_device, P("fsdp", "tensor"), specs))(whole)
    gathered, ids, positions, grad = jax.device_get(found)
    assert sorted(ids[ids >= 0].tolist()) == list(range(whole.shape[1]))  # each column counts once
    for block, of_block, at in zip(gathered, ids, positions, strict=True):
        np.testing.assert_array_equal(block[:, of_block >= 0], whole[:, of_block[of_block >= 0]])
        here = at < blocks.width
        np.testing.assert_array_equal(of_block[at[here]], np.flatnonzero(here))
    np.testing.assert_array_equal(
        grad, 4 * whole
    )  # a shard is summed over the four devices of fsdp and tensor, which gave the same


def test_only_several_tpus_are_told_to_sum_beside_other_work() -> None:
    mesh = AbstractMesh((1, 8, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    assert compiler_options(Target("cpu", mesh)) is compiler_options(Target("tpu")) is None
    assert "xla_tpu_enable_async_collective_fusion_fuse_all_reduce" in (compiler_options(Target("tpu", mesh)) or {})

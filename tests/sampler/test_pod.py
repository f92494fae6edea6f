"""The sampler's programs as compiled for a TPU pod that is not here: what they copy, exchange and hold."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, Mesh

from r3rag_jax.compiling import hlo
from r3rag_jax.parallel.mesh import AXES
from r3rag_jax.sampler.memory import bytes_per_device
from r3rag_jax.sampler.programs import SamplerPrograms

pytestmark = pytest.mark.tpu
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COPIES = ("copy", "transpose", "reshape", "convert", "bitcast-convert", "concatenate", "pad", "slice")
SLOTS, LENGTH = 64, 3072
# 28 query heads of 4 kv heads, as Qwen2.5-7B: eight devices of `tensor` do not divide them.
QWEN = dataclasses.replace(tiny.LLAMA_8B_OF_TWO_LAYERS, hidden_size=3584, num_heads=28, num_kv_heads=4, ffn_size=18_944)


def programs_on(pod, sizes, shard_weights, config=QWEN):
    mesh = Mesh(np.array(pod)[: math.prod(sizes)].reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)
    options = {"slots": SLOTS, "max_length": LENGTH, "decode_chunk": 64, "shard_weights": shard_weights}
    programs = SamplerPrograms(config, mesh, dtype=jnp.bfloat16, **options)
    return programs, programs.abstract_decoder(jnp.bfloat16)


def shares(tree):
    """Number of elements of each array of a tree on one device."""
    return {math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)}


def copied(program):
    """Sizes of what is copied or reordered in HBM, also in loops.

    Copies and slices that are started and awaited later, which move an array to faster memory and back, do not count.
    """
    for _, instruction, place in program.executed():
        if instruction.opcode in COPIES and place.fusion is None:
            yield from (array.num_elements for array in instruction.result if not array.is_on_chip)


def exchanged(program, opcodes=COLLECTIVES):
    """The arrays of all collectives, also of those that are fused with other operations."""
    for _, instruction, _ in program.executed():
        if instruction.opcode.removesuffix("-start") in opcodes:
            yield from instruction.result


@pytest.mark.parametrize(
    ("sizes", "shard_weights"), [((16, 1, 1), False), ((4, 1, 4), False), ((2, 1, 8), False), ((2, 4, 2), True)]
)
def test_decode_copies_no_weight_and_no_cache_and_moves_rows_alone(pod, sizes, shard_weights):
    programs, policy = programs_on(pod, sizes, shard_weights)
    compiled = programs.decode_program(policy).lower().compile()
    text = hlo.read(compiled.as_text())
    weights = {size for size in shares(policy) if size >= 2**20}
    caches = shares(programs.cache)
    assert (weights | caches).isdisjoint(copied(text))
    rows = SLOTS // sizes[0]  # of devices that share them: a row's logits are the most that moves of it
    moved = [array.num_elements for array in exchanged(text)]
    assert 0 < max(moved) <= rows * QWEN.vocab_size
    assert max(moved) < min(caches)
    held = bytes_per_device((programs.cache, policy), jax.tree.map(lambda x: x.sharding, (programs.cache, policy)))
    counted = compiled.memory_analysis()
    assert counted.argument_size_in_bytes == pytest.approx(held, rel=0.1)  # tiles are padded
    assert counted.temp_size_in_bytes < 2**27


def test_a_device_of_eight_holds_one_kv_head_of_four(pod):
    programs, _ = programs_on(pod, (2, 1, 8), False)
    held = bytes_per_device(programs.cache, jax.tree.map(lambda x: x.sharding, programs.cache))
    assert held == 2 * QWEN.num_layers * SLOTS // 2 * LENGTH * QWEN.head_dim * 2  # bfloat16 keys and values


@pytest.mark.parametrize(("sizes", "shard_weights"), [((4, 1, 4), False), ((2, 4, 2), True)])
def test_prefill_gathers_weights_over_fsdp_alone(pod, sizes, shard_weights):
    programs, policy = programs_on(pod, sizes, shard_weights)
    compiled = programs.prefill_program(policy, 4, 512).lower().compile()
    text = hlo.read(compiled.as_text())
    gathered = {array.num_elements for array in exchanged(text) if len(array.dims) == 2}
    assert any(size >= 2**20 for size in gathered) == shard_weights
    reduced = [array for array in exchanged(text, ("all-reduce", "reduce-scatter")) if array.num_elements > 2**16]
    assert reduced and {array.dtype for array in reduced} == {"f32"}
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30


def test_copies_of_rows_stay_on_their_devices(pod):
    programs, _ = programs_on(pod, (4, 1, 4), False)
    text = hlo.read(programs.copy_program().lower().compile().as_text())
    assert not list(exchanged(text))

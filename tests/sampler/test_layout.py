"""How heads and weights are split over devices: typed out, and with the rollouts and the cache of one device."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import AxisType

from r3rag_jax.models.decoder import Decoder
from r3rag_jax.parallel.mesh import AXES
from r3rag_jax.parallel.target import Target
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.sampler.layout import PAD, HeadSlots
from r3rag_jax.sampler.memory import plan
from r3rag_jax.sampler.ops import SamplerOps
from r3rag_jax.types import Context

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]
DEFAULT = {(1, 2, 4)}


def test_heads_that_divide_are_dealt_out_in_order():
    slots = HeadSlots(num_heads=8, num_kv_heads=4, tensor=2)
    assert slots.kv_heads().tolist() == [0, 1, 2, 3]
    assert slots.query_heads().tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_more_devices_than_kv_heads_share_the_query_heads_of_one():
    slots = HeadSlots(num_heads=14, num_kv_heads=2, tensor=8)
    assert slots.kv_heads().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    first = [[0, 1], [2, 3], [4, 5], [6, PAD]]
    assert slots.query_heads().tolist() == [*first, [7, 8], [9, 10], [11, 12], [13, PAD]]


def test_fewer_devices_than_kv_heads_are_padded_at_the_end():
    slots = HeadSlots(num_heads=9, num_kv_heads=3, tensor=2)
    assert slots.kv_heads().tolist() == [0, 1, 2, PAD]
    assert slots.query_heads().tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [PAD] * 3]


@pytest.mark.parametrize("tensor", range(1, 17))
@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (14, 2), (9, 3), (32, 8), (5, 5), (12, 2)])
def test_every_head_is_on_one_device_and_its_kv_head_beside_it(heads, kv_heads, tensor):
    slots = HeadSlots(heads, kv_heads, tensor)
    queries, kv = slots.query_heads(), slots.kv_heads()
    assert sorted(queries[queries != PAD].tolist()) == list(range(heads))
    assert queries.shape[0] == len(kv) == slots.num_slots and slots.num_slots % tensor == 0
    assert slots.num_slots // tensor == math.ceil(kv_heads / tensor)  # a device holds no more than it must
    for slot, head in np.argwhere(queries != PAD):
        assert queries[slot, head] // (heads // kv_heads) == kv[slot]


def odd_model(tie_embeddings: bool) -> Decoder:
    """14 query heads of 2 kv heads, biases, and a width, an ffn and a vocabulary that eight devices do not divide."""
    config = dataclasses.replace(
        tiny.decoder().config, num_heads=14, num_kv_heads=2, head_dim=8, hidden_size=36, ffn_size=60,
        tie_embeddings=tie_embeddings,
    )  # fmt: skip
    model = Decoder(config, rngs=nnx.Rngs(0))
    for seed, name in enumerate(("q_bias", "k_bias", "v_bias")):
        bias = getattr(model.layers, name)
        bias[...] = tiny.normal(seed, *bias[...].shape)
    return model


def make_engine(model, sizes, shard_weights, slots):
    mesh = jax.make_mesh(sizes, AXES, devices=jax.devices()[: math.prod(sizes)], axis_types=(AxisType.Auto,) * 3)
    graphdef, params = nnx.split(model)
    engine = Engine(graphdef, model.config, mesh, slots=slots, max_length=96, shard_weights=shard_weights)
    return engine, engine.load(params)


def sampled(engine, policy):
    """Greedy and at temperature 1, all slots but one: rows of one call, after passages were added to some."""
    rng, slots = np.random.default_rng(0), engine.slots
    ids = [rng.integers(20, 260, 5 + row).tolist() for row in range(slots - 1)]
    keys = rng.integers(0, 2**32, (slots, 2), np.uint32)
    contexts = {row: Context(ids[row % 5], 8, float(row % 2), keys[row]) for row in range(slots - 1)}
    engine.set_context(policy, contexts)
    engine.decode(policy, 4, leave_at=slots)
    grown = [*engine.rows.tokens[1, : engine.rows.lengths[1]].tolist(), *ids[2]]
    engine.set_context(policy, {1: Context(grown, 8, 1.0, keys[1])})
    engine.decode(policy, 8, leave_at=slots)
    return engine.rows


@pytest.mark.parametrize("slots", [8, pytest.param(7, marks=pytest.mark.slow)])  # 7: every device has all rows
@pytest.mark.parametrize("shard_weights", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tie_embeddings", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "sizes", [pytest.param(sizes, marks=() if sizes in DEFAULT else pytest.mark.slow) for sizes in MESHES]
)
def test_heads_that_do_not_divide_change_nothing(sizes, shard_weights, slots, tie_embeddings):
    model = odd_model(tie_embeddings)
    one = sampled(*make_engine(model, (1, 1, 1), False, slots))
    engine, policy = make_engine(model, sizes, shard_weights, slots)
    many = sampled(engine, policy)
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_allclose(many.logprobs, one.logprobs, atol=1e-4)
    # Each device holds its rows of the kv heads that its query heads read, half of all from tensor=2 on.
    config, ways = model.config, math.prod(sizes[:2]) if slots == 8 else 1
    kv_heads = 2 if sizes[2] == 1 else 1
    held = 2 * config.num_layers * (slots // ways) * kv_heads * 96 * config.head_dim * 4
    device = jax.devices()[0]
    shards = [shard for x in jax.tree.leaves(engine._cache) for shard in x.addressable_shards]
    assert sum(shard.data.nbytes for shard in shards if shard.device == device) == held
    sizes_of = plan(engine.mesh, {}, config, slots=slots, max_length=96, dtype=jnp.float32)
    copied = max(rows * positions for rows, positions in engine.programs.windows[:-1])  # of a decode call
    assert sizes_of.cache_bytes == held * (96 + math.ceil(copied / slots)) / 96


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_an_accelerators_layout_samples_the_same(dtype):
    """Keys that lie as values, matrices with inputs first: what a TPU or GPU runs, here on a CPU."""
    model = odd_model(tie_embeddings=False)
    graphdef, params = nnx.split(model)
    mesh = jax.make_mesh((1, 1, 1), AXES, devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 3)
    found = []
    for ops in (SamplerOps(Target("cpu")), SamplerOps(Target("gpu"))):
        engine = Engine(graphdef, model.config, mesh, slots=4, max_length=96, dtype=dtype, ops=ops)
        engine._needs_warm_up = False
        found.append(sampled(engine, engine.load(params)))
    np.testing.assert_array_equal(found[1].tokens, found[0].tokens)
    np.testing.assert_allclose(found[1].logprobs, found[0].logprobs, atol=1e-4)


def test_weights_of_an_accelerator_are_those_of_a_cpu():
    model = odd_model(tie_embeddings=False)
    loaded = jax.jit(CachedDecoder.of, static_argnums=1)
    cpu, gpu = (loaded(model, SamplerOps(Target(platform))) for platform in ("cpu", "gpu"))
    for mine, other in zip(cpu.layers, gpu.layers, strict=True):
        for name, value in mine.items():
            np.testing.assert_array_equal(value.T if name in ("o", "down") else value, other[name])

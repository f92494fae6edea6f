"""Keys and values in eight bits: how far they are off, and that nothing else depends on them."""

import dataclasses

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given

from r3rag_jax.config import MeshConfig
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.sampler.cache.base import KEY_BLOCK
from r3rag_jax.sampler.cache.kv_cache import KVCache, make_layer_cache
from r3rag_jax.sampler.cache.xla import AttendBlocks, quantize
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.sampler.ops import XLA_ON_ONE_CPU
from r3rag_jax.types import Context

SLOW = pytest.mark.slow
CONFIG = tiny.decoder().config
# Jitted: an eager call compiles every operation by itself, which takes longer.
attend = jax.jit(lambda cache, *args: cache.attend(*args))
write = jax.jit(lambda cache, *args: cache.write(*args))


@given(hnp.arrays(np.float32, (3, 8), elements=st.floats(-1e3, 1e3, width=32)))
def test_quantized_values_are_off_by_half_a_step_at_most(x):
    values, scale = quantize(jnp.asarray(x))
    assert values.dtype == jnp.int8 and scale.shape == (3,)
    tiny_number = 1e-35  # a scale of 1 / 127 of it XLA takes for 0
    np.testing.assert_allclose(np.asarray(scale), np.abs(x).max(axis=1) / 127, rtol=1e-6, atol=tiny_number)
    bound = 0.5001 * np.asarray(scale)[:, None] + tiny_number
    assert (np.abs(np.asarray(values) * np.asarray(scale)[:, None] - x) <= bound).all()


def test_typed_out():
    values, scale = quantize(jnp.array([[127.0, -63.6, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert values.tolist() == [[127, -64, 0, 0], [0, 0, 0, 0]]
    assert scale.tolist() == [1.0, 0.0]


def test_attention_in_eight_bits():
    """The weights of keys and the sum of values, each with its own scale, whatever their sizes."""
    B, C, K, H, S = 2, 3, CONFIG.num_kv_heads, CONFIG.head_dim, 8
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = jnp.exp(jax.random.normal(keys[3], (B, C, K, 1)))
    k, v = (sizes * jax.random.normal(key, (B, C, K, H)) for key in keys[:2])
    q = jax.random.normal(keys[2], (B, C, CONFIG.num_heads, H))
    positions = jnp.array([[0, 1, 2], [3, 4, 5]])
    outs = []
    for dtype in (jnp.float32, jnp.int8):
        cache = write(make_layer_cache(CONFIG, B, S, dtype, XLA_ON_ONE_CPU), k, v, positions)
        outs.append(attend(cache, q, positions))
    assert outs[1].dtype == jnp.float32
    difference = jnp.linalg.norm(outs[0] - outs[1]) / jnp.linalg.norm(outs[0])
    assert 0 < difference < 0.02


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=SLOW), jnp.int8])
@pytest.mark.parametrize(
    "last", [[3, 6], pytest.param([60, 130], marks=SLOW), pytest.param([0, 299], marks=SLOW), [210, 299]]
)
@pytest.mark.parametrize(
    ("C", "S", "sizes"),
    [(4, 300, ((64, 64), (60, 150), (150, 128))), (4, 320, ((64, 32), (32, 160), (256, 128))), (1, 320, ())],
)
def test_block_by_block_equals_at_once(dtype, last, C, S, sizes):
    """Whatever the blocks, and where the last one is not whole; of some rows as of all. Against keys that lie whole."""
    B, K, H = 4, CONFIG.num_kv_heads, CONFIG.head_dim
    k, v = (3 * np.asarray(tiny.normal(seed, B, S, K, H)) for seed in (0, 1))
    cache = write(make_layer_cache(CONFIG, B, S, dtype, XLA_ON_ONE_CPU), k, v, np.tile(np.arange(S), (B, 1)))
    assert cache.k.shape == ((B, K, S // KEY_BLOCK, H, KEY_BLOCK) if S % KEY_BLOCK == 0 else (B, K, 1, H, S))
    whole = dataclasses.replace(cache, k=jnp.moveaxis(cache.k, 2, 3).reshape(B, K, 1, H, S))
    q, others_first = tiny.normal(2, 2, C, CONFIG.num_heads, H), np.array([1, 1, 0, 0])
    rows, positions = np.array([3, 1]), np.maximum(np.array(last)[:, None] - np.arange(C), 0)
    outs = [attend(whole, q, positions, rows)]
    for common, others in ((S, S), *sizes):
        cache = dataclasses.replace(cache, blocks=AttendBlocks(common, others))
        outs.append(attend(cache, q, positions, rows))
        of_all = attend(cache, np.asarray(q)[others_first], positions[others_first])
        np.testing.assert_allclose(np.asarray(of_all)[[3, 1]], outs[-1], rtol=1e-6, atol=1e-6)
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], rtol=1e-5, atol=1e-2 if dtype == jnp.bfloat16 else 1e-5)


def test_out_of_range_rows_are_not_written():
    B, K, H = 2, CONFIG.num_kv_heads, CONFIG.head_dim
    cache = make_layer_cache(CONFIG, B, 8, jnp.float32, XLA_ON_ONE_CPU)
    new = jnp.ones((3, 2, K, H))
    after = cache.write(new, new, jnp.tile(jnp.array([4, 5]), (3, 1)), jnp.array([1, 2, 3]))
    assert not after.v[0].any() and (after.v[1, :, 4:6] == 1).all() and after.v.sum() == 2 * K * H


def test_sampling_with_an_int8_cache():
    """A third of the bytes, about the same distribution; appended or prefilled at once, from any slot."""
    graphdef, params = nnx.split(tiny.decoder())
    mesh, ids = make_mesh(MeshConfig()), list(range(20, 50))
    logprobs = []
    for dtype in (jnp.float32, jnp.int8):
        engine = Engine(graphdef, CONFIG, mesh, slots=3, max_length=200, dtype=dtype)
        policy = engine.load(params)
        engine.set_context(policy, {0: Context(ids, 4), 2: Context(ids, 4)})
        engine.decode(policy, 4, leave_at=3)
        np.testing.assert_array_equal(engine.rows.logprobs[0], engine.rows.logprobs[2])
        grown = [*engine.rows.tokens[0, :34].tolist(), *range(60, 100)]
        engine.set_context(policy, {0: Context(grown, 6), 1: Context(grown, 6)})  # behind what it holds, and whole
        engine.decode(policy, 6, leave_at=3)
        np.testing.assert_allclose(engine.rows.logprobs[0, 74:80], engine.rows.logprobs[1, 74:80], atol=0.02)
        logprobs.append(engine.rows.logprobs[2, 30:34])
    np.testing.assert_allclose(logprobs[0], logprobs[1], atol=0.1)
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves(KVCache.init(dataclasses.replace(CONFIG, head_dim=64), 1, 64, dtype)))
        for dtype in (jnp.float32, jnp.bfloat16, jnp.int8)
    ]
    assert sizes[2] < 0.27 * sizes[0] and sizes[2] < 0.54 * sizes[1]

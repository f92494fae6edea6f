"""The memory plan against the arrays that are really there."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import AxisType

from r3rag_jax.config import MeshConfig
from r3rag_jax.errors import UserError
from r3rag_jax.models.decoder import Decoder
from r3rag_jax.parallel.mesh import AXES, make_mesh
from r3rag_jax.sampler import memory
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.sampler.memory import MemoryPlan, device_memory, plan
from r3rag_jax.types import Context

CONFIG = tiny.decoder().config


def held(tree):
    """Bytes of the arrays of a tree on the first device."""
    device = jax.devices()[0]
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.parametrize("slots", [8, 16, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_is_what_the_engine_allocates(slots, dtype):
    mesh = make_mesh(MeshConfig())
    planned = plan(mesh, {}, CONFIG, slots=slots, max_length=64, dtype=jnp.dtype(dtype))
    graphdef, _ = nnx.split(tiny.decoder())
    engine = Engine(graphdef, CONFIG, mesh, slots=slots, max_length=64, dtype=jnp.dtype(dtype))
    part = max(
        (rows * positions for rows, positions in engine.programs.windows[:-1]), default=0
    )  # that a call works on
    assert (part == 0) == (slots != 3)  # 64 positions are too few for a part of them, rows over eight devices stay
    assert planned.cache_bytes == planned.total_bytes == held(engine._cache) / 64 * (64 + math.ceil(part / slots))


def test_decoding_peaks_within_a_tenth_of_the_plan():
    """As the compiler counts: what comes in and is not reused, what goes out, and what it needs in between.

    In float32: a CPU widens the whole cache of another type while it decodes.
    """
    config = dataclasses.replace(CONFIG, num_layers=4, head_dim=64)  # so that scores are small beside keys and values
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    shape = {"slots": 8, "max_length": 1024, "dtype": jnp.dtype("float32")}
    [device] = jax.devices()[:1]
    mesh = jax.make_mesh((1, 1, 1), AXES, devices=[device], axis_types=(AxisType.Auto,) * 3)
    engine, planned = Engine(graphdef, config, mesh, **shape), plan(mesh, {"weights": weights}, config, **shape)
    policy, peaks = engine.load(params), []
    for window in engine.programs.windows:
        counted = engine.programs.decode_program(policy, window).lower().compile().memory_analysis()
        held = counted.argument_size_in_bytes + counted.output_size_in_bytes - counted.alias_size_in_bytes
        peaks.append(held + counted.temp_size_in_bytes)
    assert max(peaks) == pytest.approx(planned.total_bytes, rel=0.1)


def test_a_bfloat16_cache_under_float32_compute():
    graphdef, params = nnx.split(tiny.decoder())
    written = []
    for dtype in (jnp.float32, jnp.bfloat16):
        engine = Engine(graphdef, CONFIG, make_mesh(MeshConfig()), slots=2, max_length=96, dtype=dtype)
        policy = engine.load(params)
        assert {leaf.dtype for leaf in jax.tree.leaves(engine._cache)} == {jnp.dtype(dtype)}
        engine.set_context(policy, {0: Context(list(range(20, 50)), 4)})
        engine.decode(policy, 4, leave_at=1)
        written.append((engine.rows.tokens[0, 30], engine.rows.logprobs[0, 30]))
    assert written[0][0] == written[1][0]
    np.testing.assert_allclose(written[0][1], written[1][1], atol=0.05)


@pytest.mark.parametrize("ways", [1, 4])
def test_a_plan_that_does_not_fit_names_the_most_slots_that_do(ways):
    planned = MemoryPlan(
        {"weights": 1000}, num_slots=64, num_shards=ways, slot_bytes=100, device_bytes=1000 + 100 * 64 // ways
    )
    planned.check()
    tight = dataclasses.replace(planned, device_bytes=1000 + 250)
    with pytest.raises(UserError, match=f"rollout.slots must be at most {2 * ways} for .* got 64"):
        tight.check()
    dataclasses.replace(tight, num_slots=2 * ways).check()
    with pytest.raises(UserError):
        dataclasses.replace(tight, num_slots=3 * ways).check()
    with pytest.raises(UserError, match="what is trained must fit"):
        dataclasses.replace(tight, device_bytes=900).check()
    dataclasses.replace(tight, device_bytes=None).check()  # a device that does not say


def test_the_host_says_what_it_has(monkeypatch):
    mesh = make_mesh(MeshConfig())
    monkeypatch.setattr(memory, "_available", lambda: 8000)
    assert device_memory(mesh) == 8000 // len(jax.devices())
    assert "0.00 + cache of 8 slots" in str(plan(mesh, {"weights": 5}, CONFIG, slots=8, max_length=9, dtype=jnp.int8))

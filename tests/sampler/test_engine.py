"""The sampler against a naive loop: same tokens, same log-probabilities, whatever the batch."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from r3rag_jax.config import MeshConfig
from r3rag_jax.parallel.mesh import make_mesh, make_sampler_mesh
from r3rag_jax.parallel.target import ONE_CPU
from r3rag_jax.rl.token_losses import chunked_logprobs
from r3rag_jax.sampler import decode as decode_module
from r3rag_jax.sampler import prefill_plan, windows
from r3rag_jax.sampler.cache.base import KEY_BLOCK, padded
from r3rag_jax.sampler.cache.kv_cache import KVCache
from r3rag_jax.sampler.distribution import WHOLE, Truncation
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.sampler.sampling import first_largest, invert
from r3rag_jax.sampler.state import RowStatus
from r3rag_jax.sampler.stops import StopTokens
from r3rag_jax.types import Context

MAX_LENGTH = 96


@pytest.fixture(scope="module")
def model():
    return tiny.decoder()


def make_engine(model, slots=4, pauses=(), stops=(), num_devices=None, mesh=None, **options):
    """On all devices, or on so many."""
    graphdef, params = nnx.split(model)
    mesh, options = make_mesh(mesh or MeshConfig()), {"slots": slots, "max_length": MAX_LENGTH, **options}
    if num_devices is not None:
        mesh = make_sampler_mesh(MeshConfig(sampler_devices=num_devices), mesh)
    engine = Engine(graphdef, model.config, mesh, **options)
    engine.decode = functools.partial(engine.decode, stops=StopTokens(pauses, stops))
    return engine, engine.load(params)


def prompt(seed, length):
    return np.random.default_rng(seed).integers(20, 260, length).tolist()


@functools.cache
def jitted_forward(model):
    return jax.jit(lambda tokens, positions: model.logits(model(tokens, positions)))


def naive(model, ids, num, temperature, key, min_p=0.0):
    """Full forward per token, one row at a time: (sampled ids, log-probabilities)."""
    forward = jitted_forward(model)
    ids, logprobs = list(ids), []
    for _ in range(num):
        tokens = np.zeros((1, MAX_LENGTH), np.int32)
        tokens[0, : len(ids)] = ids
        logits = forward(tokens, np.arange(MAX_LENGTH)[None])[0, len(ids) - 1]
        shares = np.exp(np.asarray(logits - logits.max(), np.float64) / (temperature or 1.0))
        logits = jnp.where(shares >= min_p, logits, -jnp.inf)
        if temperature > 0:
            row_key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(key, jnp.uint32)), len(ids))
            weights = np.exp(np.asarray(logits, np.float64) / temperature)
            token = int(
                np.searchsorted(np.cumsum(weights) / weights.sum(), float(jax.random.uniform(row_key)), "right")
            )
        else:
            token = int(jnp.argmax(logits))
        logprobs.append(float(jax.nn.log_softmax(logits / (temperature or 1.0))[token]))
        ids.append(token)
    return ids[-num:], logprobs


@pytest.mark.parametrize("num_devices", [None, 1])
@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_engine_equals_naive_loop(model, min_p, num_devices):
    """At three temperatures."""
    engine, policy = make_engine(model, truncation=Truncation(min_p), num_devices=num_devices)
    contexts = {
        row: Context(prompt(row, 5 + 17 * row), 12, temperature, np.array([row, 9], np.uint32))
        for row, temperature in enumerate((0.0, 0.7, 1.0))
    }
    engine.set_context(policy, contexts)
    engine.decode(policy, 100, leave_at=4)
    assert engine.find(RowStatus.DONE) == [0, 1, 2]
    for row, context in contexts.items():
        start = len(context.ids)
        ids, logprobs = naive(model, context.ids, 12, context.temperature, context.key, min_p)
        assert engine.rows.tokens[row, start : start + 12].tolist() == ids
        np.testing.assert_allclose(engine.rows.logprobs[row, start : start + 12], logprobs, atol=2e-5)


@pytest.mark.parametrize(
    ("min_p", "top_k", "top_p"),
    [
        (0.0, 0, 1.0),
        (0.1, 12, 0.7),
        *(
            pytest.param(*how, marks=pytest.mark.slow)
            for how in ((0.1, 0, 1.0), (0.0, 12, 1.0), (0.0, 0, 0.7), (0.1, 12, 1.0), (0.1, 0, 0.7), (0.0, 12, 0.7))
        ),
    ],
)
def test_recorded_logprobs_are_the_trainers_for_every_truncation(model, min_p, top_k, top_p):
    how = Truncation(min_p, top_k, top_p)
    engine, policy = make_engine(model, truncation=how)
    temperatures = np.asarray([0.0, 0.5, 1.0, 1.4], np.float32)
    engine.set_context(
        policy,
        {
            row: Context(prompt(row, 8), 80, float(t), np.array([row, 9], np.uint32))
            for row, t in enumerate(temperatures)
        },
    )
    engine.decode(policy, 80, leave_at=4)
    tokens = engine.rows.tokens[:, :88]
    hidden = jax.jit(model)(tokens, np.broadcast_to(np.arange(88), tokens.shape))[:, 7:-1]
    score = functools.partial(
        chunked_logprobs, chunk=64, tied=model.config.tie_embeddings, truncation=how, target=ONE_CPU
    )
    scored_at = np.broadcast_to(np.where(temperatures > 0, temperatures, 1)[:, None], (4, 80))
    logprobs, _ = jax.jit(score)(hidden, model.output_weight(), tokens[:, 8:], scored_at, np.ones((4, 80), bool))
    np.testing.assert_allclose(engine.rows.logprobs[:, 8:88], logprobs, rtol=0, atol=1e-4)
    if how != WHOLE:
        logits = hidden[2] @ model.output_weight().T
        at_temperature_1 = jax.nn.log_softmax(logits.astype(jnp.float32))
        untruncated = np.take_along_axis(np.asarray(at_temperature_1), tokens[2, 8:, None], axis=1)[:, 0]
        assert (logprobs[2] >= untruncated - 1e-5).all() and (logprobs[2] > untruncated + 0.1).any()


@pytest.mark.parametrize("size", [1, 63, 64, 300])
def test_sampling_by_inversion(size):
    rng = np.random.default_rng(size)
    weights = rng.random(size) * (rng.random(size) < 0.3)
    weights[rng.integers(size)] = 1e-6  # rare tokens can be drawn, impossible ones never
    uniforms = np.append(rng.random(2000), [0.0, np.nextafter(np.float32(1), np.float32(0))]).astype(np.float32)
    drawn, totals = map(np.asarray, jax.vmap(invert, (None, 0))(jnp.asarray(weights, jnp.float32), uniforms))
    np.testing.assert_allclose(totals, weights.sum(), rtol=1e-5)
    assert (weights[drawn] > 0).all()
    share = np.cumsum(weights) / weights.sum()
    before = np.append(0, share)[drawn]
    assert ((before <= uniforms + 1e-5) & (uniforms - 1e-5 <= share[drawn])).all()


@pytest.mark.parametrize("size", [1, 63, 64, 300])
def test_the_first_of_the_largest(size):
    values = jnp.asarray(np.random.default_rng(size).integers(-3, 3, (50, size)), jnp.float32)
    np.testing.assert_array_equal(jax.vmap(first_largest)(values), jnp.argmax(values, axis=1))


def test_append_then_decode_equals_fresh_prefill(model):
    """A paused row whose context grows by passages: only these are prefilled, and nothing changes."""
    engine, policy = make_engine(model)
    engine.set_context(policy, {1: Context(prompt(0, 20), 6)})
    engine.decode(policy, 6, leave_at=1)
    grown = engine.rows.tokens[1, :26].tolist() + prompt(1, 40)
    before = engine.num_prefilled
    engine.set_context(policy, {1: Context(grown, 8)})
    assert engine.num_prefilled - before == 40  # the last sampled token and the passages, less the last one
    engine.decode(policy, 8, leave_at=1)
    fresh, _ = make_engine(model)
    fresh.set_context(policy, {0: Context(grown, 8)})
    fresh.decode(policy, 8, leave_at=1)
    assert engine.rows.tokens[1, 66:74].tolist() == fresh.rows.tokens[0, 66:74].tolist()
    np.testing.assert_allclose(engine.rows.logprobs[1, 66:74], fresh.rows.logprobs[0, 66:74], atol=2e-5)


def test_the_samples_of_a_question_are_prefilled_once(model):
    """Bit for bit what each row has when it is prefilled by itself, and what it then writes."""
    ids = prompt(1, 60)
    contexts = {row: Context(ids, 6, 1.0, np.array([row, 1], np.uint32)) for row in (0, 2, 3)}
    together, policy = make_engine(model)
    together.set_context(policy, {2: Context(ids[:20] + prompt(7, 20), 2)})  # a row that holds a part already
    together.num_prefilled = 0
    together.set_context(policy, contexts)
    assert together.num_prefilled == 59
    alone, _ = make_engine(model)
    for row, context in contexts.items():
        alone.set_context(policy, {row: context})
    assert alone.num_prefilled == 3 * 59
    for mine, other in zip(together._cache.layers, alone._cache.layers, strict=True):
        np.testing.assert_array_equal(mine.v[np.array([0, 2, 3]), :, :59], other.v[np.array([0, 2, 3]), :, :59])
    for engine in (together, alone):
        engine.decode(policy, 6, leave_at=4)
    np.testing.assert_array_equal(together.rows.tokens[[0, 2, 3], :66], alone.rows.tokens[[0, 2, 3], :66])
    np.testing.assert_array_equal(together.rows.logprobs[[0, 2, 3], 60:66], alone.rows.logprobs[[0, 2, 3], 60:66])


def test_a_changed_prefix_is_prefilled_anew(model):
    engine, policy = make_engine(model)
    first, second = prompt(0, 30), prompt(0, 10) + prompt(5, 25)
    engine.set_context(policy, {0: Context(first, 4)})
    engine.decode(policy, 4, leave_at=1)
    before = engine.num_prefilled
    engine.set_context(policy, {0: Context(second, 5)})
    assert engine.num_prefilled - before == len(second) - 1 - 10
    engine.decode(policy, 5, leave_at=1)
    assert engine.rows.tokens[0, 35:40].tolist() == naive(model, second, 5, 0.0, None)[0]


def test_trajectory_does_not_depend_on_slot_or_neighbours(model):
    key = np.array([3, 4], np.uint32)
    alone, policy = make_engine(model)
    alone.set_context(policy, {0: Context(prompt(7, 24), 20, 1.0, key)})
    alone.decode(policy, 20, leave_at=1)
    crowd, _ = make_engine(model, slots=6)
    contexts = {row: Context(prompt(row, 12), 9, 0.5, np.array([row, 1], np.uint32)) for row in (0, 2, 3)}
    crowd.set_context(policy, contexts | {5: Context(prompt(7, 24), 20, 1.0, key)})
    for _ in range(7):
        crowd.decode(policy, 3, leave_at=1)
    assert crowd.rows.tokens[5, 24:44].tolist() == alone.rows.tokens[0, 24:44].tolist()


MOVED = r"= \(?\w+\[([\d,]+)\].* (?:all-gather|all-to-all|collective-permute)(?:-start)?\("
MESHES = [
    pytest.param(MeshConfig(), False, id="data 8", marks=pytest.mark.slow),
    pytest.param(MeshConfig(fsdp=4), False, id="data 2, fsdp 4", marks=pytest.mark.slow),
    pytest.param(MeshConfig(fsdp=4), True, id="data 2, fsdp 4, weights split", marks=pytest.mark.slow),
    pytest.param(MeshConfig(fsdp=2, tensor=2), False, id="data 2, fsdp 2, tensor 2"),
]


@pytest.mark.usefixtures("own_programs")
@pytest.mark.parametrize(("mesh", "is_split"), MESHES)
def test_any_mesh_samples_what_one_device_does(model, monkeypatch, mesh, is_split):
    """Rows that lack much and little, more of a device's than a call takes, a context on two devices, a second turn."""
    shapes = prefill_plan.PrefillShapes(lengths=(32, 64), totals=(64, 128))
    monkeypatch.setattr(prefill_plan, "CPU_SHAPES", shapes)

    def sampled(**options):
        engine, policy = make_engine(model, slots=16, max_length=300, **options)
        contexts = {row: Context(prompt(row, 20 + 9 * row), 12) for row in range(16) if row not in (2, 9)}
        contexts |= {row: Context(prompt(2, 160), 12) for row in (2, 9)}
        engine.set_context(policy, contexts)
        engine.decode(policy, 5, leave_at=16)
        grown = {row: engine.rows.tokens[row, : engine.rows.lengths[row]].tolist() for row in (0, 1, 14)}
        engine.set_context(policy, {row: Context([*ids, *prompt(row, 40)], 12) for row, ids in grown.items()})
        engine.decode(policy, 12, leave_at=16)
        return engine

    one, many = sampled(num_devices=1), sampled(mesh=mesh, shard_weights=is_split)
    assert many.num_prefilled == one.num_prefilled + 159  # rows 2 and 9 are on two devices, which both prefill it
    np.testing.assert_array_equal(many.rows.tokens, one.rows.tokens)
    np.testing.assert_allclose(many.rows.logprobs, one.rows.logprobs, atol=1e-4)


@pytest.mark.parametrize(("mesh", "is_split"), [param for param in MESHES if not param.values[1]])
def test_devices_exchange_neither_cache_nor_hidden_states_nor_weights(model, mesh, is_split):
    """Over (data, fsdp); over `tensor` also the device's own rows. What a row has sampled goes back to every host."""
    engine, policy = make_engine(model, slots=16, mesh=mesh, shard_weights=is_split)
    programs = engine.programs.prefill_program(policy, 2, 32), engine.programs.decode_program(policy)
    moved = [
        {tuple(map(int, shape.split(","))) for shape in re.findall(MOVED, program.lower().compile().as_text())}
        for program in programs
    ]
    # Of 2 rows x 32 tokens, 16 on each device: normalized hidden states, embeddings [2, 16, 32 / 2].
    assert moved[0] == ({(2, 32, 32), (2, 16, 16)} if mesh.tensor == 2 else set())
    # Of 4 rows, one token each: embeddings, logits [4 / 2, 267 padded to 268 / 2], sampled tokens.
    own_rows = {(4, 1, 32), (2, 134), (4,)} if mesh.tensor == 2 else set()
    assert {(16, 32)} | own_rows <= moved[1] <= {(16,), (16, 2), (16, 32)} | own_rows  # 32: the tokens of a call


@pytest.mark.usefixtures("own_programs")
@pytest.mark.parametrize(
    ("row_shares", "expected"),
    [((), [(4, 64), (4, 160), (4, 320)]), ((4, 2), [(1, 160), (1, 320)])],
)
def test_a_decode_call_works_on_the_part_of_the_cache_that_it_needs(model, monkeypatch, row_shares, expected):
    """Short rows write what they write with the whole cache; a longer one that waits meanwhile keeps what it has."""

    def sampled(row_shares):
        monkeypatch.setattr(windows, "ROW_SHARES", row_shares)
        engine, policy = make_engine(model, max_length=300, num_devices=1, decode_chunk=100)
        engine.set_context(policy, {0: Context(prompt(0, 30), 100), 3: Context(prompt(3, 200), 100)})
        engine.release(3)
        before = [np.array(layer.v[3, :, :199]) for layer in engine._cache.layers]
        engine.decode(policy, 32, leave_at=4)
        for layer, old in zip(engine._cache.layers, before, strict=True):
            np.testing.assert_array_equal(layer.v[3, :, :199], old)
        engine.decode(policy, 100, leave_at=4)  # over the border of what the first call had
        engine.set_context(policy, {3: Context(prompt(3, 200), 100)})
        engine.decode(policy, 100, leave_at=4)
        return engine

    decode, compiled = decode_module.decode, []

    def spied(decoder, cache, places, *args, positions, **options):
        compiled.append((len(places), positions))
        return decode(decoder, cache, places, *args, positions=positions, **options)

    monkeypatch.setattr(decode_module, "decode", spied)
    parts = sampled(row_shares)
    monkeypatch.setattr(windows, "POSITION_SHARES", (1,))
    whole = sampled(())
    assert compiled == [*expected, (4, 320)]
    np.testing.assert_array_equal(parts.rows.tokens, whole.rows.tokens)
    np.testing.assert_allclose(parts.rows.logprobs, whole.rows.logprobs, atol=2e-5)
    assert parts.rows.lengths.tolist() == [130, 1, 1, 300]


@pytest.mark.parametrize(("slots", "max_length", "ways"), [(64, 480, 1), (64, 480, 4), (1, 480, 1), (3, 100, 1)])
def test_windows_reach_from_the_cheapest_to_the_whole_cache(slots, max_length, ways):
    mesh = make_sampler_mesh(MeshConfig(sampler_devices=ways), make_mesh(MeshConfig()))
    cache = jax.eval_shape(lambda: KVCache.init(tiny.decoder().config, slots, padded(max_length), jnp.float32))
    found = windows.windows(cache, mesh, max_length)
    assert found[-1] == (slots, padded(max_length)) and len(set(found)) == len(found) <= 8
    areas = [rows * positions for rows, positions in found]
    assert max(areas) == areas[-1]
    assert all(1 <= rows <= slots and 64 <= positions <= padded(max_length) for rows, positions in found)
    assert all(positions % KEY_BLOCK == 0 for _, positions in found)
    if ways > 1:
        assert {rows for rows, _ in found} == {slots}


def test_pause_stop_and_budget(model):
    base, policy = make_engine(model)
    ids, key = prompt(2, 8), np.array([5, 5], np.uint32)
    base.set_context(policy, {0: Context(ids, 10, 1.0, key)})
    base.decode(policy, 10, leave_at=1)
    third = int(base.rows.tokens[0, 10])
    assert third not in base.rows.tokens[0, 8:10]
    for name, status in (("pauses", RowStatus.NEEDS_RETRIEVAL), ("stops", RowStatus.DONE)):
        engine, _ = make_engine(model, **{name: (third,)})
        engine.set_context(policy, {2: Context(ids, 10, 1.0, key)})
        engine.decode(policy, 10, leave_at=1)
        assert engine.rows.status[2] == status
        assert engine.rows.lengths[2] == 11
    engine, _ = make_engine(model)
    engine.set_context(policy, {2: Context(ids, 4), 3: Context(prompt(3, MAX_LENGTH - 3), 50)})
    engine.decode(policy, 50, leave_at=4)
    assert engine.rows.lengths[2] == 12
    assert engine.rows.lengths[3] == MAX_LENGTH  # never beyond the cache


@pytest.mark.parametrize("chunk", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_stop_string_takes_back_what_was_sampled_behind_it(model, chunk):
    """Whatever the calls on the device: the row ends with the string, and goes on as if it had never written more."""
    contexts = {row: Context(prompt(row, 8), 30, 1.0, np.array([row, 4], np.uint32)) for row in range(3)}
    free, policy = make_engine(model)
    free.set_context(policy, contexts)
    free.decode(policy, 30, leave_at=4)
    assert free.work[:4] == (3 * 7, 3 * 30, 30, 3 * sum(range(8, 38)))  # prefilled, sampled, steps, attended
    assert free.work.bytes_read > 30 * sum(x.nbytes for x in jax.tree.leaves(policy)) / jax.device_count()
    written = free.rows.tokens[:3, 8:38].tolist()
    pair = written[0][10:12]  # stands for a string; in row 0 it may come earlier too, in row 1 it comes never

    def end_of(ids):
        return next((i + 2 for i in range(len(ids)) if ids[i : i + 2] == pair), 0)

    engine, _ = make_engine(model)
    engine.decode = functools.partial(engine.decode, stops=StopTokens(end_of=end_of))
    engine.set_context(policy, {**contexts, 2: Context([*prompt(2, 6), *pair], 30, 1.0, contexts[2].key)})
    while engine.find(RowStatus.ACTIVE):
        engine.decode(policy, chunk, leave_at=4)
    ends = [end_of(ids) for ids in written]
    assert 0 < ends[0] <= 12 and ends[1] == 0
    assert engine.find(RowStatus.DONE) == [0, 1, 2]
    assert engine.rows.lengths[:2].tolist() == [8 + ends[0], 38]
    assert engine.rows.lengths[2] > 9  # the string in its context is none that it wrote
    assert engine.rows.tokens[0, 8 : 8 + ends[0]].tolist() == written[0][: ends[0]]
    assert engine.num_sampled == int((engine.rows.lengths[:3] - 8).sum())
    grown = engine.rows.tokens[0, : 8 + ends[0]].tolist() + prompt(9, 20)
    fresh, _ = make_engine(model)
    for either in (engine, fresh):
        either.set_context(policy, {0: Context(grown, 8)})
        either.decode(policy, 8, leave_at=1)
    end = len(grown)
    assert engine.rows.tokens[0, end : end + 8].tolist() == fresh.rows.tokens[0, end : end + 8].tolist()


def test_decode_leaves_when_enough_rows_wait(model):
    engine, policy = make_engine(model)
    engine.set_context(policy, {0: Context(prompt(0, 8), 3), 1: Context(prompt(1, 8), 30)})
    engine.decode(policy, 30, leave_at=1)
    assert engine.rows.lengths[:2].tolist() == [11, 11]


def test_too_long_context_is_refused(model):
    engine, policy = make_engine(model)
    with pytest.raises(ValueError, match="1 to 95 tokens; got 96"):
        engine.set_context(policy, {0: Context(prompt(0, MAX_LENGTH), 1)})

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from r3rag_jax.config import LoraConfig, MeshConfig
from r3rag_jax.models import lora
from r3rag_jax.models.attention import attention
from r3rag_jax.models.config import DecoderConfig, RopeScaling
from r3rag_jax.models.decoder import PARAM_AXES, Decoder, param_shapes, rope_frequencies
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.sampler.cache.kv_cache import KVCache
from r3rag_jax.sampler.cached_decoder import CachedDecoder

TINY = DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=24,
    attention_bias=True,
    tie_embeddings=True,
    model_type="qwen2",
)
FAMILIES = {
    "llama": dataclasses.replace(
        TINY, attention_bias=False, tie_embeddings=False, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8), model_type="llama"
    ),
    "qwen2": TINY,
    "qwen3": dataclasses.replace(TINY, attention_bias=False, qk_norm=True, head_dim=12, model_type="qwen3"),
}


@functools.cache
def make(config: DecoderConfig = TINY, **kwargs) -> Decoder:
    """A decoder whose biases and norms are random too, so that each of them matters."""
    model = Decoder(config, rngs=nnx.Rngs(0), **kwargs)
    for i, name in enumerate(sorted(param_shapes(config))):
        if name.endswith(("_norm", "_bias")):
            param = model.param(name)
            noise = 0.3 * tiny.normal(i, *param.shape, dtype=param.dtype)
            param.set_value(param[...] + noise)
        elif not name.startswith("embed"):
            model.param(name).set_value(8 * model.param(name)[...])
    return model


# Jitted: an eager call compiles every operation by itself, which takes longer.
extend = nnx.jit(lambda model, cache, tokens, starts: CachedDecoder.of(model).extend(cache, tokens, starts))
forward = nnx.jit(lambda model, tokens, positions, segments=None: model(tokens, positions, segments))


def random_tokens(shape: tuple[int, ...], seed: int = 1) -> jax.Array:
    return tiny.integers(seed, *shape, high=TINY.vocab_size)


def positions(B: int, L: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(L), (B, L))


def test_shapes_names_and_axes_agree():
    untied = dataclasses.replace(TINY, tie_embeddings=False, qk_norm=True)
    for config in (TINY, untied):
        decoder = Decoder(config, rngs=nnx.Rngs(0))
        plain = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
        layers = plain.pop("layers")
        assert {n: p.shape for n, p in (plain | layers).items()} == param_shapes(config)
        lora.attach(decoder, LoraConfig(rank=2), make_mesh(MeshConfig()), 0, token_ids=[1, 2])
        params = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
        layers = params.pop("layers")
        for name, array in (params | layers).items():
            assert len(PARAM_AXES[name]) == array.ndim
            assert (PARAM_AXES[name][0] == "layers") == (name in layers)
    assert {*params, *layers} == set(PARAM_AXES)  # of the last one, which has everything


def test_the_graph_definition_is_hashable():
    scaling = RopeScaling(8.0, 1.0, 4.0, 64)
    config = dataclasses.replace(TINY, rope_scaling=scaling)
    graphdef, _ = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    assert isinstance(hash(graphdef), int)


def test_split_jit_merge_equals_eager():
    model = make()
    tokens = random_tokens((2, 7))
    graphdef, params = nnx.split(model)
    hidden = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t, positions(2, 7)))(params, tokens)
    np.testing.assert_allclose(hidden, model(tokens, positions(2, 7)), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("chunks", "qk_norm"), [((12,), False), ((1,) * 12, False), ((5, 1, 1, 5), True)])
def test_extend_equals_full_forward(chunks, qk_norm):
    model = make(dataclasses.replace(TINY, qk_norm=qk_norm))
    tokens = random_tokens((3, 12))
    full = forward(model, tokens, positions(3, 12))
    cache = KVCache.init(model.config, 3, 16, jnp.float32)
    start = 0
    for size in chunks:
        chunk = tokens[:, start : start + size]
        cache, hidden = extend(model, cache, chunk, jnp.full(3, start))
        np.testing.assert_allclose(hidden, full[:, start : start + size], rtol=1e-4, atol=1e-4)
        start += size


def test_extend_with_ragged_starts_and_padded_tails():
    # Row lengths 3, 6, 1 are prefilled in one padded chunk of 6; the junk behind a row's length
    # must never be seen.
    model = make()
    tokens = random_tokens((3, 10))
    full = forward(model, tokens, positions(3, 10))
    lengths = jnp.array([3, 6, 1])
    junk = random_tokens((3, 6), seed=9)
    chunk = jnp.where(jnp.arange(6) < lengths[:, None], tokens[:, :6], junk)
    cache = KVCache.init(TINY, 3, 16, jnp.float32)
    cache, hidden = extend(model, cache, chunk, jnp.zeros(3, jnp.int32))
    for row, length in enumerate((3, 6, 1)):
        np.testing.assert_allclose(hidden[row, :length], full[row, :length], rtol=1e-4, atol=1e-4)
    for step in range(4):
        at = lengths + step
        token = jnp.take_along_axis(tokens, at[:, None], axis=1)
        cache, hidden = extend(model, cache, token, at)
        want = full[jnp.arange(3), at]
        np.testing.assert_allclose(hidden[:, 0], want, rtol=1e-4, atol=1e-4)


def test_extend_drops_positions_beyond_the_cache():
    model = make()
    cache = KVCache.init(TINY, 2, 8, jnp.float32)
    cache, _ = extend(model, cache, random_tokens((2, 8)), jnp.zeros(2, jnp.int32))
    # Row 0 writes 6, 7 and drops 8, 9; row 1 starts past the end and writes nothing.
    after, hidden = extend(model, cache, random_tokens((2, 4), seed=3), jnp.array([6, 8]))
    assert bool(jnp.isfinite(hidden).all())
    for old, new in zip(cache.layers, after.layers, strict=True):
        np.testing.assert_array_equal(new.k[0, ..., :6], old.k[0, ..., :6])
        np.testing.assert_array_equal(new.k[1], old.k[1])
        np.testing.assert_array_equal(new.v[0, :, :6], old.v[0, :, :6])
        np.testing.assert_array_equal(new.v[1], old.v[1])
        assert not np.array_equal(new.k[0, ..., 6:], old.k[0, ..., 6:])
        assert not np.array_equal(new.v[0, :, 6:], old.v[0, :, 6:])


def test_cache_take_and_put():
    model = make()
    cache = KVCache.init(TINY, 4, 8, jnp.float32)
    cache, _ = extend(model, cache, random_tokens((4, 5)), jnp.zeros(4, jnp.int32))
    assert cache.slots == 8
    sub = cache.take(jnp.array([2, 0]))
    np.testing.assert_array_equal(sub.layers[1].k, cache.layers[1].k[jnp.array([2, 0])])
    back = KVCache.init(TINY, 4, 8, jnp.float32).put(jnp.array([3, 4]), sub)  # row 4: dropped
    np.testing.assert_array_equal(back.layers[0].v[3], cache.layers[0].v[2])
    np.testing.assert_array_equal(back.layers[0].v[:3], 0)


def test_donated_decode_loop_runs_on_device():
    model = make()
    graphdef, params = nnx.split(model)
    tokens = random_tokens((2, 6))

    def decode(params, cache):
        def body(carry):
            i, cache, out = carry
            token = jax.lax.dynamic_slice_in_dim(tokens, i, 1, axis=1)
            cache, hidden = CachedDecoder.of(nnx.merge(graphdef, params)).extend(cache, token, jnp.full(2, i))
            return i + 1, cache, out.at[:, i].set(hidden[:, 0])

        init = (0, cache, jnp.zeros((2, 6, TINY.hidden_size)))
        return jax.lax.while_loop(lambda carry: carry[0] < 6, body, init)[1:]

    cache = KVCache.init(TINY, 2, 8, jnp.float32)
    _, out = jax.jit(decode, donate_argnums=1)(params, cache)
    assert cache.layers[0].k.is_deleted()
    np.testing.assert_allclose(out, forward(model, tokens, positions(2, 6)), rtol=1e-4, atol=1e-4)


def test_packed_segments_equal_separate_rows():
    model = make()
    a, b = random_tokens((1, 5)), random_tokens((1, 4), seed=2)
    packed = jnp.concatenate([a, b, jnp.zeros((1, 3), a.dtype)], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    packed_positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])
    hidden = forward(model, packed, packed_positions, segments)
    np.testing.assert_allclose(hidden[:, :5], forward(model, a, positions(1, 5)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hidden[:, 5:9], forward(model, b, positions(1, 4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_depend_on_where_the_padding_lies(family):
    """Rows of 9, 1, 12 and 5 tokens: padded on the right, on the left, in between, and all in one row."""
    model, lengths, L = make(FAMILIES[family]), (9, 1, 12, 5), 30
    rows = [np.asarray(random_tokens((1, n), seed=n))[0] for n in lengths]
    logits = nnx.jit(lambda model, tokens, positions, segments: model.logits(model(tokens, positions, segments)))

    def run(places: list[list[tuple[int, np.ndarray]]]) -> np.ndarray:
        """Logits [B, L, V] of rows in which text i has its tokens at the given columns; the rest is noise."""
        tokens = np.asarray(random_tokens((len(places), L), seed=99)).copy()
        at, segments = np.zeros((2, len(places), L), np.int32)
        for row, texts in enumerate(places):
            for number, (i, columns) in enumerate(texts, 1):
                tokens[row, columns], at[row, columns], segments[row, columns] = rows[i], np.arange(lengths[i]), number
        return np.asarray(logits(model, tokens, at, segments))

    rng = np.random.default_rng(0)
    want = run([[(i, np.arange(n))] for i, n in enumerate(lengths)])
    left = [np.arange(L - n, L) for n in lengths]
    ragged = [np.sort(rng.choice(L, n, replace=False)) for n in lengths]
    for columns in (left, ragged):
        got = run([[(i, columns[i])] for i in range(len(lengths))])
        for i, n in enumerate(lengths):
            np.testing.assert_allclose(got[i, columns[i]], want[i, :n], rtol=1e-4, atol=1e-4)
    starts = (1, 11, 12, 25)  # a gap in front, one behind the first and one behind the third
    packed = run([[(i, start + np.arange(n)) for i, (start, n) in enumerate(zip(starts, lengths, strict=True))]] * 4)
    for i, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        np.testing.assert_allclose(packed[0, start : start + n], want[i, :n], rtol=1e-4, atol=1e-4)


def test_padding_is_finite_and_has_no_gradient():
    model = make()
    graphdef, params = nnx.split(model)
    tokens = random_tokens((1, 6))
    segments = jnp.array([[1, 1, 1, 0, 0, 0]])

    def loss(params, remat):
        hidden = nnx.merge(graphdef, params)(tokens, positions(1, 6), segments, remat=remat)
        return jnp.sum(jnp.square(hidden[:, :3]))

    grads = {r: jax.jit(jax.grad(loss), static_argnums=1)(params, r) for r in ("none", "full", "dots")}
    embed = grads["none"]["embed"][...]
    assert bool(jnp.isfinite(embed).all())
    used = np.unique(tokens[0, :3])
    unused = np.setdiff1d(np.unique(tokens[0, 3:]), used)
    assert np.all(np.abs(embed[used]).sum(axis=1) > 0)
    np.testing.assert_array_equal(embed[unused], 0)
    for remat in ("full", "dots"):
        for a, b in zip(jax.tree.leaves(grads["none"]), jax.tree.leaves(grads[remat]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_future_tokens_do_not_change_the_past():
    model = make()
    tokens = random_tokens((1, 8))
    changed = tokens.at[0, 5].set((tokens[0, 5] + 1) % TINY.vocab_size)
    before, after = forward(model, tokens, positions(1, 8)), forward(model, changed, positions(1, 8))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.all(np.abs(before - after)[0, 5:].max(axis=-1) > 1e-4)


def test_logits_of_a_tied_and_an_untied_model():
    tied = make()
    hidden = tiny.normal(0, 2, 3, TINY.hidden_size)
    logits = tied.logits(hidden)
    assert logits.shape == (2, 3, TINY.vocab_size) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, hidden @ tied.embed[...].T, rtol=1e-5, atol=1e-6)
    untied = make(dataclasses.replace(TINY, tie_embeddings=False))
    want = hidden @ untied.lm_head[...]
    np.testing.assert_allclose(untied.logits(hidden), want, rtol=1e-5, atol=1e-6)


def test_bfloat16_forward_and_cache():
    # One step of bfloat16 is 0.4 %. The median token is compared with float32, because a random model has tokens
    # that amplify rounding; the cached path, which rounds at the same places, must follow the full one throughout.
    # XLA's CPU backend once refused the cached products of this dtype (BF16 x BF16 = F32 with two batch dimensions).
    tokens = random_tokens((2, 9))
    full = forward(make(), tokens, positions(2, 9))
    scale = float(jnp.abs(full).mean())
    model = make(dtype=jnp.bfloat16)
    half = forward(model, tokens, positions(2, 9))
    assert half.dtype == jnp.bfloat16 and model.logits(half).dtype == jnp.float32
    error = jnp.abs(half.astype(jnp.float32) - full).mean(axis=-1)
    assert 0 < float(jnp.median(error)) < 0.03 * scale
    cache = KVCache.init(TINY, 2, 16, jnp.bfloat16)
    _, cached = extend(model, cache, tokens, jnp.zeros(2, jnp.int32))
    assert cached.dtype == jnp.bfloat16
    difference = jnp.abs(cached.astype(jnp.float32) - half.astype(jnp.float32))
    assert float(difference.mean()) < 0.02 * scale


def test_the_embeddings_stay_as_they_are_in_a_decode_loop():
    """In bfloat16 a CPU's compiler would widen, or copy, all of them in front of it: in every call."""
    config = dataclasses.replace(TINY, vocab_size=5000)
    decoder = jax.eval_shape(lambda: CachedDecoder.of(Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))
    cache = jax.eval_shape(lambda: KVCache.init(config, 2, 32, jnp.float32))
    tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)

    def loop(decoder, cache, tokens):
        def step(at, carry):
            cache, tokens = carry
            cache, hidden = decoder.extend(cache, tokens, jnp.full(2, at))
            return cache, jnp.argmax(decoder.logits(hidden), axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, 8, step, (cache, tokens))

    program = jax.jit(loop).lower(decoder, cache, tokens).compile().as_text()
    made = re.findall(rf"= (\w+)\[{config.vocab_size},{config.hidden_size}\]\S* (\w[\w-]*)\(", program)
    assert ("bf16", "parameter") in made
    assert {op for _, op in made} <= {"parameter", "get-tuple-element", "bitcast-convert"}


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_predicts_what_float32_does(family):
    """KL of the next-token distributions, mean over positions, in nats."""
    config = dataclasses.replace(FAMILIES[family], hidden_size=64, ffn_size=96)
    tokens = random_tokens((4, 64))
    logprobs = nnx.jit(lambda model: jax.nn.log_softmax(model.logits(model(tokens, positions(4, 64)))))

    def build(dtype) -> Decoder:  # as drawn: trained models do not amplify rounding as `make` does
        model = Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)
        if config.tie_embeddings:
            model.embed.set_value(1.5 * model.embed[...])
        return model

    exact, rounded = logprobs(build(jnp.float32)), logprobs(build(jnp.bfloat16))
    knows = np.log(TINY.vocab_size) + float((jnp.exp(exact) * exact).sum(-1).mean())
    kl = float((jnp.exp(exact) * (exact - rounded)).sum(-1).mean())
    assert knows > 0.3  # nats less than a uniform distribution: there is something to get wrong
    assert 0 < kl < 3e-4  # 0.6e-4 to 1e-4 was seen


def test_llama3_frequencies():
    # theta 16, H 8: plain frequencies 1, 1/2, 1/4, 1/8. Over 100 positions the first turns t = 100
    # / 2 pi times. High is t/2 turns or more, low t/8 or fewer: kept, kept, a blend with (1/4 -
    # 1/8) / (1/2 - 1/8) = 1/3, divided.
    t = 100 / (2 * np.pi)
    scaling = RopeScaling(8.0, t / 8, t / 2, 100)
    config = dataclasses.replace(TINY, rope_theta=16.0, rope_scaling=scaling)
    want = [1.0, 0.5, 0.25 / 3 + 0.25 / 8 * 2 / 3, 0.125 / 8]
    np.testing.assert_allclose(rope_frequencies(config), want, rtol=1e-6)


def test_sharded_equals_single():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    to_mesh = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "mlp": "tensor"}
    tokens = random_tokens((8, 4))
    want = forward(make(), tokens, positions(8, 4))
    with jax.set_mesh(mesh):
        model = Decoder(TINY, rngs=nnx.Rngs(0))
    for name in param_shapes(TINY):
        axes = PartitionSpec(*(to_mesh.get(axis) for axis in PARAM_AXES[name]))
        model.param(name).set_value(jax.device_put(make().param(name)[...], NamedSharding(mesh, axes)))
    graphdef, params = nnx.split(model)
    tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("fsdp")))
    hidden = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t, positions(8, 4)))(params, tokens)
    assert len(hidden.sharding.device_set) == 8
    np.testing.assert_allclose(hidden, want, rtol=1e-4, atol=1e-4)


def test_unknown_names_are_refused():
    model = make()
    tokens = random_tokens((1, 3))
    with pytest.raises(ValueError, match=r"remat must be one of .*got 'some'"):
        model(tokens, positions(1, 3), remat="some")
    with pytest.raises(ValueError, match=r"attention_implementation must be one of .*'flash'"):
        Decoder(TINY, rngs=nnx.Rngs(0), attention_implementation="flash")
    q = jnp.zeros((1, 2, 4, 8))
    with pytest.raises(ValueError, match=r"implementation must be one of .*'flash'"):
        attention(q, q[:, :, :2], q[:, :, :2], implementation="flash")


def test_attention_by_hand():
    # One head pair sharing one kv head, H = 1: scores are q * k. Token 1 weighs v = 1, 3 by
    # softmax(0, ln 3) = 1/4, 3/4.
    q = jnp.array([[[[1.0], [0.0]], [[1.0], [0.0]]]])
    k = jnp.array([[[[0.0]], [[np.log(3.0)]]]])
    v = jnp.array([[[[1.0]], [[3.0]]]])
    out = attention(q, k, v)
    np.testing.assert_allclose(out[0, :, :, 0], [[1.0, 1.0], [2.5, 2.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads must be divisible by num_kv_heads 3; got 4"),
        ({"head_dim": 7}, "head_dim must be even and positive for RoPE; got 7"),
        ({"num_layers": 0}, "num_layers must be at least 1; got 0"),
        ({"model_type": "gpt2"}, "model_type must be one of .*got 'gpt2'"),
    ],
)
def test_config_relations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)

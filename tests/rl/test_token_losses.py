"""Losses over the vocabulary: chunked against plain, and typed-out numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, AxisType

from r3rag_jax.parallel.target import ONE_CPU, Target
from r3rag_jax.rl.token_losses import chunked_logprobs, cross_entropy
from r3rag_jax.sampler.distribution import Truncation

NUM_ROWS, NUM_TOKENS, WIDTH, VOCAB = 2, 13, 8, 31
EIGHT_CPUS = Target("cpu", AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,)))
# Columns of both rows at once: 1, 5 + 5 + 3, all; where the target cannot branch all, whatever the chunk's size.
CHUNKS = [(1, ONE_CPU), (10, ONE_CPU), (64, ONE_CPU), (10, EIGHT_CPUS)]


@pytest.fixture(params=[ONE_CPU, EIGHT_CPUS], ids=["in chunks", "in one"])
def target(request):
    return request.param


def _inputs(dtype=jnp.float32):
    return (
        tiny.normal(0, NUM_ROWS, NUM_TOKENS, WIDTH, dtype=dtype),
        tiny.normal(1, WIDTH, VOCAB, dtype=dtype),
        tiny.integers(2, NUM_ROWS, NUM_TOKENS, high=VOCAB),
        jnp.stack([jnp.arange(NUM_TOKENS) % 3 != 1, jnp.arange(NUM_TOKENS) == 7]),
    )


def _plain_cross_entropy(hidden_TD, weight_DV, targets_T, mask_T):
    logits_TV = jnp.dot(hidden_TD, weight_DV, preferred_element_type=jnp.float32)
    nats_T = -jnp.take_along_axis(jax.nn.log_softmax(logits_TV), targets_T[..., None], -1)[..., 0]
    right_T = jnp.argmax(logits_TV, axis=-1) == targets_T
    count = jnp.sum(mask_T)
    return jnp.sum(nats_T * mask_T) / count, jnp.sum(right_T * mask_T) / count


def _plain_logprobs(hidden_TD, weight_DV, targets_T, temperature_T, mask_T, min_p=0.0):
    probs_TV = jax.nn.softmax(hidden_TD @ weight_DV / temperature_T[..., None])
    kept_TV = probs_TV >= min_p * jnp.max(probs_TV, axis=-1, keepdims=True)
    kept_TV |= jax.nn.one_hot(targets_T, VOCAB, dtype=bool)
    probs_TV = jnp.where(kept_TV, probs_TV, 0.0)
    probs_TV /= jnp.sum(probs_TV, axis=-1, keepdims=True)
    logprobs_T = jnp.log(jnp.take_along_axis(probs_TV, targets_T[..., None], -1)[..., 0])
    surprise_TV = -jnp.log(jnp.where(kept_TV, probs_TV, 1.0))
    return logprobs_T * mask_T, jnp.sum(probs_TV * surprise_TV, axis=-1) * mask_T


def _total(function, hidden_TD, weight_DV, temperature_T):
    """A number that depends on every log-probability and entropy."""
    _, _, targets_T, mask_T = _inputs()
    weights_T = jnp.linspace(-1.0, 2.0, mask_T.size).reshape(mask_T.shape)
    logprobs_T, entropy_T = function(hidden_TD, weight_DV, targets_T, temperature_T, mask_T)
    return jnp.sum(weights_T * logprobs_T) + jnp.sum(entropy_T * weights_T**2)


def _values_and_gradients(function, hidden_TD, weight_DV, targets_T, temperature_T, mask_T):
    gradients = jax.jit(jax.grad(functools.partial(_total, function), (0, 1, 2)))
    values = jax.jit(function)(hidden_TD, weight_DV, targets_T, temperature_T, mask_T)  # no differentiation
    return values, gradients(hidden_TD, weight_DV, temperature_T)


@functools.cache
def _expected_logprobs(min_p):
    hidden_TD, weight_DV, targets_T, mask_T = _inputs()
    temperature_T = jnp.linspace(0.4, 1.3, mask_T.size).reshape(mask_T.shape)
    args = hidden_TD, weight_DV, targets_T, temperature_T, mask_T
    return args, *_values_and_gradients(functools.partial(_plain_logprobs, min_p=min_p), *args)


@functools.cache
def _expected_cross_entropy():
    return jax.jit(jax.value_and_grad(_plain_cross_entropy, (0, 1), has_aux=True))(*_inputs())


def _assert_close(actual, expected, tolerance=1e-6):
    """Relative to the largest entry: single gradient entries may cancel to nearly nothing."""
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def _largest_intermediate(function, *args):
    """Return the most entries of any array in the jaxpr, inner jaxprs included."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield from (var.aval.size for var in equation.outvars)
            for inner in jax.tree.leaves(
                list(equation.params.values()),
                is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"),
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return max(walk(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize(("min_p", "tied"), [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize(("chunk", "target"), CHUNKS)
def test_chunked_logprobs_match_plain_in_value_and_gradient(chunk, target, min_p, tied):
    args, expected, expected_grads = _expected_logprobs(min_p)
    chunked = functools.partial(chunked_logprobs, chunk=chunk, target=target, truncation=Truncation(min_p))
    chunked = _of_table(chunked) if tied else chunked
    actual, grads = _values_and_gradients(chunked, *args)
    for value, expected_value in zip(actual, expected, strict=True):
        assert value.dtype == jnp.float32 and value.shape == args[-1].shape
        np.testing.assert_allclose(value, expected_value, rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        _assert_close(grad, expected_grad, 2e-6)


def test_chunked_logprobs_at_a_temperature(target):
    # Two words with logits 0 and log 3: p = 3/4 at temperature 1, 9/10 at temperature 1/2.
    logprobs_T, entropy_T = jax.jit(functools.partial(chunked_logprobs, chunk=2, target=target))(
        jnp.ones((1, 3, 1)),
        jnp.array([[0.0, jnp.log(3.0)]]),
        jnp.array([[1, 1, 1]]),
        jnp.array([[1.0, 0.5, 0.0]]),
        jnp.array([[True, True, False]]),
    )
    np.testing.assert_allclose(jnp.exp(logprobs_T), [[0.75, 0.9, 1.0]], rtol=1e-5)
    np.testing.assert_allclose(entropy_T, [[0.562335, 0.325083, 0.0]], rtol=1e-5)


def test_chunked_logprobs_behind_min_p(target):
    # Weights 10, 5, 4 at min_p .45: the third is below 4.5. Where it is the target itself, nothing is left out.
    logprobs_T, entropy_T = jax.jit(
        functools.partial(chunked_logprobs, chunk=2, target=target, truncation=Truncation(min_p=0.45))
    )(
        jnp.ones((1, 3, 1)),
        jnp.log(jnp.array([[10.0, 5.0, 4.0]])),
        jnp.array([[0, 1, 2]]),
        jnp.ones((1, 3)),
        jnp.ones((1, 3), bool),
    )
    np.testing.assert_allclose(jnp.exp(logprobs_T), [[2 / 3, 1 / 3, 4 / 19]], rtol=1e-5)
    np.testing.assert_allclose(entropy_T, [[0.636514, 0.636514, 1.017154]], rtol=1e-4)


def _of_table(function):
    """The same function of a projection, which is given to it as a table of embeddings."""
    return lambda hidden_TD, weight_DV, *rest: function(hidden_TD, weight_DV.T, *rest, tied=True)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(("chunk", "target"), CHUNKS)
def test_cross_entropy_matches_plain_in_value_and_gradient(chunk, target, tied):
    args = _inputs()
    chunked = functools.partial(cross_entropy, chunk=chunk, target=target)
    chunked = _of_table(chunked) if tied else chunked
    expected, expected_grads = _expected_cross_entropy()
    actual, grads = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(*args)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(chunked)(*args), expected, rtol=1e-6)  # no differentiation
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        _assert_close(grad, expected_grad)
    # A loss that is scaled and added to others scales its gradient.
    scaled = jax.jit(jax.grad(lambda *args: 3.0 * chunked(*args)[0]))(*args)
    _assert_close(scaled, 3.0 * expected_grads[0])


def test_cross_entropy_divides_by_the_kept_tokens_only(target):
    hidden_TD, weight_DV, targets_T, mask_T = _inputs()
    jitted = jax.jit(functools.partial(cross_entropy, chunk=4, target=target))
    short = jitted(hidden_TD[mask_T][None], weight_DV, targets_T[mask_T][None], jnp.ones((1, int(mask_T.sum())), bool))
    garbage_T = jnp.where(mask_T, targets_T, -100)  # the ignore id of Hugging Face labels
    masked, grads = jax.jit(jax.value_and_grad(functools.partial(cross_entropy, chunk=4, target=target), has_aux=True))(
        hidden_TD, weight_DV, garbage_T, mask_T
    )
    np.testing.assert_allclose(masked, short, rtol=1e-6)
    np.testing.assert_array_equal(np.any(grads != 0, axis=-1), mask_T)
    nothing = jitted(hidden_TD, weight_DV, targets_T, jnp.zeros_like(mask_T))
    np.testing.assert_array_equal(nothing, [0.0, 0.0])


@pytest.mark.parametrize("tied", [False, True])
def test_a_sure_token_has_a_small_gradient_in_bfloat16(tied, target):
    # p = 0.999: one minus it is a thousandth, which is lost where p is rounded to bfloat16 first.
    hidden_TD, weight_DV = jnp.ones((1, 1, 1), jnp.bfloat16), jnp.asarray([[6.90625, 0.0]], jnp.bfloat16)
    chunked = functools.partial(cross_entropy, chunk=1, target=target)
    chunked = _of_table(chunked) if tied else chunked
    grad = jax.grad(lambda w: chunked(hidden_TD, w, jnp.zeros((1, 1), int), jnp.ones((1, 1), bool))[0])(weight_DV)
    np.testing.assert_allclose(grad.astype(jnp.float32), [[-1e-3, 1e-3]], rtol=0.01)


def test_cross_entropy_typed_out(target):
    # Uniform over four words: log 4 nats; argmax takes the first of equals, so one of two is right.
    loss, accuracy = cross_entropy(
        jnp.zeros((1, 2, 3)), jnp.ones((3, 4)), jnp.array([[0, 3]]), jnp.ones((1, 2), bool), chunk=1, target=target
    )
    np.testing.assert_allclose([loss, accuracy], [np.log(4.0), 0.5], rtol=1e-6)


def test_logits_never_exist_whole():
    hidden_TD, weight_DV = jnp.ones((1, 64, 4)), jnp.ones((4, 100))
    targets_T, mask_T = jnp.zeros((1, 64), int), jnp.ones((1, 64), bool)

    def loss(hidden_TD, weight_DV):
        logprobs_T, entropy_T = chunked_logprobs(
            hidden_TD, weight_DV, targets_T, jnp.ones((1, 64)), mask_T, chunk=8, target=ONE_CPU
        )
        nats, _ = cross_entropy(hidden_TD, weight_DV, targets_T, mask_T, chunk=8, target=ONE_CPU)
        return nats + jnp.sum(logprobs_T) + jnp.sum(entropy_T)

    # 8 * 100 for a chunk's logits; the whole would be 64 * 100.
    assert _largest_intermediate(jax.grad(loss, (0, 1)), hidden_TD, weight_DV) == 800
    plain = jax.grad(lambda *args: _plain_cross_entropy(*args, targets_T, mask_T)[0])
    assert _largest_intermediate(plain, hidden_TD, weight_DV) == 6400


@pytest.mark.parametrize("name", ["chunked_logprobs", "cross_entropy"])
def test_bfloat16_weight_gradient_is_summed_in_float32(name, target):
    # A bfloat16 sum of ones stalls at 256 (256 + 1 rounds to 256). One token per chunk is the worst
    # case.
    num_tokens = 1024
    hidden_TD = jnp.ones((1, num_tokens, 1), jnp.bfloat16)
    weight_DV = jnp.zeros((1, 2), jnp.bfloat16)
    targets_T, mask_T = jnp.zeros((1, num_tokens), jnp.int32), jnp.ones((1, num_tokens), bool)

    def loss(weight_DV):
        if name == "cross_entropy":
            return num_tokens * cross_entropy(hidden_TD, weight_DV, targets_T, mask_T, chunk=1, target=target)[0]
        ones_T = jnp.ones((1, num_tokens))
        return -jnp.sum(chunked_logprobs(hidden_TD, weight_DV, targets_T, ones_T, mask_T, chunk=1, target=target)[0])

    gradient = jax.jit(jax.grad(loss))(weight_DV)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(jnp.float32), [[-512.0, 512.0]])


def test_bfloat16_close_to_float32(target):
    args = _inputs(jnp.bfloat16)
    wide = args[0].astype(jnp.float32), args[1].astype(jnp.float32), *args[2:]
    chunked = functools.partial(cross_entropy, chunk=10, target=target)
    both = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))
    (loss, grads), (wide_loss, wide_grads) = both(*args), both(*wide)
    np.testing.assert_allclose(loss, wide_loss, rtol=1e-5)
    for grad, wide_grad in zip(grads, wide_grads, strict=True):
        _assert_close(grad.astype(jnp.float32), wide_grad, 1e-2)


def test_chunk_must_be_positive():
    hidden_TD, weight_DV, targets_T, mask_T = _inputs()
    with pytest.raises(ValueError, match="chunk must be at least 1 token; got 0"):
        cross_entropy(hidden_TD, weight_DV, targets_T, mask_T, chunk=0, target=ONE_CPU)
    with pytest.raises(ValueError, match="chunk must be at least 1 token; got -1"):
        chunked_logprobs(hidden_TD, weight_DV, targets_T, jnp.ones(mask_T.shape), mask_T, chunk=-1, target=ONE_CPU)

"""Losses: typed-out numbers, and chunked against plain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r3rag_jax.rl.losses import (
    adapted_kl,
    kl_penalty,
    loss_mean,
    masked_mean,
    ppo_policy_loss,
    truncated_weights,
    value_loss,
)
from r3rag_jax.rl.token_losses import chunked_logprobs, cross_entropy
from r3rag_jax.sampler.distribution import Truncation

NUM_ROWS, NUM_TOKENS, WIDTH, VOCAB = 2, 13, 8, 31
CHUNKS = [1, 10, 64]  # columns of both rows at once: 1, 5 + 5 + 3, all


@pytest.fixture(autouse=True, params=[1, 8], ids=["in chunks", "in one"])
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: request.param)


def _inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (NUM_ROWS, NUM_TOKENS, WIDTH), dtype),
        jax.random.normal(keys[1], (WIDTH, VOCAB), dtype),
        jax.random.randint(keys[2], (NUM_ROWS, NUM_TOKENS), 0, VOCAB),
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


def test_masked_mean():
    x = jnp.array([1.0, jnp.nan, 3.0])
    assert masked_mean(x, jnp.array([True, False, True])) == 2.0
    assert masked_mean(x, jnp.zeros(3, bool)) == 0.0


def test_ppo_policy_loss_typed_out():
    ratio = jnp.array([1.0, 2.0, 2.0, 0.5, 0.5, 1.1])
    advantages = jnp.array([1.0, 1.0, -1.0, 1.0, -1.0, 2.0])
    # kept: 1, clipped 1.2, -2, .5, clipped -.8, 2.2; the masked tail would be nan
    tail = jnp.array([jnp.nan])
    mask = jnp.arange(7) < 6
    loss, stats = ppo_policy_loss(
        jnp.concatenate([jnp.log(ratio) - 1.0, tail]),
        jnp.concatenate([jnp.full(6, -1.0), tail]),
        jnp.concatenate([advantages, tail]),
        mask,
        clip=0.2,
    )
    np.testing.assert_allclose(loss, -(1.0 + 1.2 - 2.0 + 0.5 - 0.8 + 2.2) / 6, rtol=1e-5)
    np.testing.assert_allclose(stats["clip_fraction"], 4 / 6)
    np.testing.assert_allclose(stats["approx_kl"], np.mean(ratio - 1 - np.log(ratio)), rtol=1e-5)
    # of what did better than expected: ratios 1, 2, .5 and 1.1
    np.testing.assert_allclose(stats["displacement"], np.mean(np.log([1, 2, 0.5, 1.1])), rtol=1e-5)


def test_ppo_policy_loss_with_two_bounds_and_weights_typed_out():
    ratio = jnp.array([1.25, 1.5, 0.75, 0.7, 1.5])
    advantages = jnp.array([1.0, 1.0, -1.0, -1.0, -1.0])
    weights = jnp.array([1.0, 2.0, 0.5, 1.0, jnp.nan])
    mask = jnp.arange(5) < 4
    # 1.25 within 1.28; 1.5 clipped to 1.28, twice; .75 clipped to .8, half; .7 clipped to .8
    loss = functools.partial(ppo_policy_loss, mask=mask, clip=0.2, clip_high=0.28, weights=weights)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(x, jnp.zeros(5), advantages)[0]))(jnp.log(ratio))
    np.testing.assert_allclose(value, -(1.25 + 2 * 1.28 - 0.5 * 0.8 - 0.8) / 4, rtol=1e-6)
    np.testing.assert_allclose(gradient, [-1.25 / 4, 0, 0, 0, 0], rtol=1e-6)
    stats = loss(jnp.log(ratio), jnp.zeros(5), advantages)[1]
    np.testing.assert_allclose(stats["clip_fraction"], 3 / 4)


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        ("token", (1 + 2 + 3 + 6) / 4, [1 / 4, 1 / 4, 1 / 4, 1 / 4, 0]),
        ("sequence", ((1 + 2 + 3) / 3 + 6) / 2, [1 / 6, 1 / 6, 1 / 6, 1 / 2, 0]),
        ("constant", (1 + 2 + 3 + 6) / 10 / 2, [1 / 20, 1 / 20, 1 / 20, 1 / 20, 0]),
    ],
)
def test_loss_means_typed_out(kind, value, gradient):
    """A trajectory of three tokens and one of one; the fifth token is a passage."""
    x, shares = jnp.array([1.0, 2, 3, 6, jnp.nan]), jnp.array([1 / 3, 1 / 3, 1 / 3, 1, jnp.nan])
    mean = functools.partial(loss_mean, mask=jnp.arange(5) < 4, shares=shares, kind=kind, length=10)
    found = jax.jit(jax.value_and_grad(lambda x: mean(x)))(x)
    np.testing.assert_allclose(found[0], value, rtol=1e-6)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-6)
    rows = jax.jit(jax.vmap(lambda x, s, m: loss_mean(x, m, s, kind=kind, length=10)))
    masks = jnp.stack([jnp.arange(5) < 4, jnp.zeros(5, bool)])
    np.testing.assert_allclose(rows(jnp.stack([x, x]), jnp.stack([shares, shares]), masks), [value, 0], rtol=1e-6)


def test_a_trajectory_in_two_batches_counts_once_in_all():
    x, shares, mask = jnp.array([1.0, 2, 3]), jnp.full(3, 1 / 3), jnp.array([True, True, False])
    # two thirds of a trajectory, and its mean over those: 2/3 (1 + 2) / 2 over 2/3
    np.testing.assert_allclose(loss_mean(x, mask, shares, kind="sequence", length=1), 1.5, rtol=1e-6)
    np.testing.assert_allclose(loss_mean(x, mask, shares, kind="constant", length=6), (1 + 2) / 6 / (2 / 3), rtol=1e-6)
    with pytest.raises(ValueError, match="token, sequence, constant; got 'batch'"):
        loss_mean(x, mask, shares, kind="batch", length=1)


def test_truncated_weights_typed_out():
    old = jnp.log(jnp.array([0.5, 0.9, 0.2, 0.1]))
    behaviour = jnp.append(jnp.log(jnp.array([0.5, 0.3, 0.4])), jnp.nan)
    mask = jnp.arange(4) < 3
    weights, stats = jax.jit(functools.partial(truncated_weights, limit=2.0))(old, behaviour, mask)
    np.testing.assert_allclose(weights, [1, 2, 0.5, 0], rtol=1e-6)
    np.testing.assert_allclose(stats["weight"], 3.5 / 3, rtol=1e-6)
    np.testing.assert_allclose(stats["truncated_fraction"], 1 / 3, rtol=1e-6)
    huge, _ = truncated_weights(jnp.zeros(1), jnp.array([-500.0]), jnp.ones(1, bool), 3.0)
    np.testing.assert_allclose(huge, [3.0])


def test_truncated_weights_give_the_policys_gradient_from_anothers_samples():
    """Averaged over what the sampler writes, weight times grad log-probability is the policy's own average."""
    logits, behaviour = jnp.array([0.2, -0.4, 0.9]), jax.nn.log_softmax(jnp.array([0.0, 0.5, 0.1]))
    advantages, old = jnp.array([1.0, -2.0, 0.5]), jax.nn.log_softmax(logits)

    def surrogate(logits, limit):
        weights, _ = truncated_weights(old, behaviour, jnp.ones(3, bool), limit)
        per_token = lambda x, _: jnp.sum(jnp.exp(behaviour) * x)  # the average over the sampler  # noqa: E731
        return ppo_policy_loss(jax.nn.log_softmax(logits), old, advantages, jnp.ones(3, bool), clip=0.2,
                               weights=weights, mean=per_token)[0]  # fmt: skip

    expected = jax.grad(lambda x: -jnp.sum(jax.nn.softmax(x) * advantages))(logits)
    np.testing.assert_allclose(jax.grad(surrogate)(logits, 100.0), expected, rtol=1e-5)
    assert np.abs(jax.grad(surrogate)(logits, 1.0) - expected).max() > 0.01


def test_ppo_gradient_is_policy_gradient_on_policy_and_stops_at_the_clip():
    mask = jnp.array([True, True, True, False])
    advantages = jnp.array([1.0, -2.0, 3.0, 5.0])
    behaviour = jnp.array([-1.0, -0.5, -2.0, -1.0])

    def loss(logprobs):
        return ppo_policy_loss(logprobs, behaviour, advantages, mask, clip=0.2)[0]

    np.testing.assert_allclose(
        jax.grad(loss)(behaviour), [-1 / 3, 2 / 3, -1.0, 0.0], rtol=1e-6
    )  # - A / count at ratio 1
    np.testing.assert_allclose(jax.grad(loss)(behaviour + jnp.array([0.5, -0.5, 0.0, 0.0])), [0.0, 0.0, -1.0, 0.0])


def test_ppo_stays_finite_when_one_token_explodes():
    loss = functools.partial(ppo_policy_loss, mask=jnp.ones(1, bool), clip=0.2)
    value, gradient = jax.value_and_grad(lambda x: loss(x, jnp.array([-200.0]), jnp.array([-1.0]))[0])(jnp.array([0.0]))
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))


def test_value_loss_typed_out():
    values, old_values = jnp.array([1.0, 1.0, 1.0, jnp.nan]), jnp.array([0.0, 0.9, 0.0, 0.0])
    returns, mask = jnp.array([1.0, 2.0, 0.5, 0.0]), jnp.array([True, True, True, False])
    # 1) perfect, but moved beyond the clip: (.2 - 1)^2; 2) inside: (1 - 2)^2; 3) max(.5^2, (.2 -
    # .5)^2)
    expected = 0.5 * (0.64 + 1.0 + 0.25) / 3
    np.testing.assert_allclose(value_loss(values, old_values, returns, mask, clip=0.2), expected)
    unclipped = value_loss(values, old_values, returns, mask, clip=float("inf"))
    np.testing.assert_allclose(unclipped, 0.5 * (0.0 + 1.0 + 0.25) / 3)
    gradient = jax.grad(value_loss)(values, old_values, returns, mask, clip=0.2)
    np.testing.assert_allclose(gradient, [0.0, -1 / 3, 0.5 / 3, 0.0], rtol=1e-6)


def test_kl_penalty():
    logprobs, ref_logprobs = jnp.array([-1.0, -1.0]), jnp.array([-1.0, -2.0])
    for kind, second in [("k1", 1.0), ("k2", 0.5), ("k3", np.exp(-1.0))]:
        np.testing.assert_allclose(kl_penalty(logprobs, ref_logprobs, kind), [0.0, second], rtol=1e-6)
    with pytest.raises(ValueError, match=r"k1, k2, k3; got 'k4'"):
        kl_penalty(logprobs, ref_logprobs, "k4")


def test_kl_estimates_are_unbiased():
    # Averaged over the policy's own distribution, k1 and k3 are the divergence itself.
    policy_V, ref_V = (jax.nn.log_softmax(jax.random.normal(jax.random.key(seed), (VOCAB,))) for seed in (1, 2))
    divergence = jnp.sum(jnp.exp(policy_V) * (policy_V - ref_V))
    for kind in ("k1", "k3"):
        estimate = jnp.sum(jnp.exp(policy_V) * kl_penalty(policy_V, ref_V, kind))
        np.testing.assert_allclose(estimate, divergence, rtol=1e-5)


@functools.cache
def _policy_losses():
    """Of each kind of mean: value and gradient of a whole policy loss, with bounds and weights."""

    def loss(logprobs, old, advantages, weights, shares, mask, kind):
        mean = functools.partial(loss_mean, shares=shares, kind=kind, length=7)
        options = {"clip": 0.2, "clip_high": 0.3, "weights": weights, "mean": mean}
        policy_loss, _ = ppo_policy_loss(logprobs, old, advantages, mask, **options)
        return policy_loss + 0.1 * mean(kl_penalty(logprobs, jnp.where(mask, weights - 2, 0.0), "k3"), mask)

    kinds = ("token", "sequence", "constant")
    return [jax.jit(jax.value_and_grad(functools.partial(loss, kind=kind))) for kind in kinds]


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_masked_tokens_count_nothing_and_rows_may_come_in_any_order(seed, share_kept):
    rng = np.random.default_rng(seed)
    mask = rng.random((4, 6)) < share_kept
    inputs = [rng.normal(size=mask.shape).astype(np.float32) for _ in range(3)]
    inputs += [rng.random(mask.shape).astype(np.float32) for _ in range(2)]
    spoilt = [np.where(mask, x, np.nan).astype(np.float32) for x in inputs]
    order = rng.permutation(4)
    for loss in _policy_losses():
        value, gradient = loss(*inputs, mask)
        assert np.isfinite(value) and (np.asarray(gradient)[~mask] == 0).all()
        without, same = loss(inputs[0], *spoilt[1:], mask)
        assert without == value and np.array_equal(same, gradient)
        permuted, rows = loss(*(x[order] for x in inputs), mask[order])
        np.testing.assert_allclose(permuted, value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows, np.asarray(gradient)[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradients_of_kl_losses_are_what_the_docstring_says(kind):
    # Averaged over the policy's own distribution, which itself is not differentiated: samples are constants.
    logits, ref_V = jax.random.normal(jax.random.key(1), (VOCAB,)), jax.nn.log_softmax(jnp.linspace(-1, 1, VOCAB))
    policy_V = jax.nn.softmax(logits)
    found = jax.jit(jax.grad(lambda x: jnp.sum(policy_V * kl_penalty(jax.nn.log_softmax(x), ref_V, kind))))(logits)
    kl = lambda p_V, q_V: jnp.sum(jnp.exp(p_V) * (p_V - q_V))  # noqa: E731
    expected = {
        "k1": jnp.zeros(VOCAB),
        "k2": jax.grad(lambda x: kl(jax.nn.log_softmax(x), ref_V))(logits),
        "k3": jax.grad(lambda x: kl(ref_V, jax.nn.log_softmax(x)))(logits),
    }[kind]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (np.abs(found).max() > 1e-2) == (kind != "k1")


def test_adapted_kl_typed_out():
    assert adapted_kl(0.5, 0.11, 0.1, 0.1) == pytest.approx(0.5 * 1.01)  # a tenth above the target
    assert adapted_kl(0.5, 9.0, 0.1, 0.1) == pytest.approx(0.5 * 1.02)  # clipped at a fifth
    assert adapted_kl(0.5, -1.0, 0.1, 0.5) == pytest.approx(0.5 * 0.9)
    assert adapted_kl(0.5, 0.1, 0.1, 0.1) == 0.5


@pytest.mark.parametrize(("min_p", "tied"), [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunked_logprobs_match_plain_in_value_and_gradient(chunk, min_p, tied):
    args, expected, expected_grads = _expected_logprobs(min_p)
    chunked = functools.partial(chunked_logprobs, chunk=chunk, truncation=Truncation(min_p))
    chunked = _of_table(chunked) if tied else chunked
    actual, grads = _values_and_gradients(chunked, *args)
    for value, expected_value in zip(actual, expected, strict=True):
        assert value.dtype == jnp.float32 and value.shape == args[-1].shape
        np.testing.assert_allclose(value, expected_value, rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        _assert_close(grad, expected_grad, 2e-6)


def test_chunked_logprobs_at_a_temperature():
    # Two words with logits 0 and log 3: p = 3/4 at temperature 1, 9/10 at temperature 1/2.
    logprobs_T, entropy_T = jax.jit(functools.partial(chunked_logprobs, chunk=2))(
        jnp.ones((1, 3, 1)),
        jnp.array([[0.0, jnp.log(3.0)]]),
        jnp.array([[1, 1, 1]]),
        jnp.array([[1.0, 0.5, 0.0]]),
        jnp.array([[True, True, False]]),
    )
    np.testing.assert_allclose(jnp.exp(logprobs_T), [[0.75, 0.9, 1.0]], rtol=1e-5)
    np.testing.assert_allclose(entropy_T, [[0.562335, 0.325083, 0.0]], rtol=1e-5)


def test_chunked_logprobs_behind_min_p():
    # Weights 10, 5, 4 at min_p .45: the third is below 4.5. Where it is the target itself, nothing is left out.
    logprobs_T, entropy_T = jax.jit(functools.partial(chunked_logprobs, chunk=2, truncation=Truncation(min_p=0.45)))(
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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_cross_entropy_matches_plain_in_value_and_gradient(chunk, tied):
    args = _inputs()
    chunked = functools.partial(cross_entropy, chunk=chunk)
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


def test_cross_entropy_divides_by_the_kept_tokens_only():
    hidden_TD, weight_DV, targets_T, mask_T = _inputs()
    jitted = jax.jit(functools.partial(cross_entropy, chunk=4))
    short = jitted(hidden_TD[mask_T][None], weight_DV, targets_T[mask_T][None], jnp.ones((1, int(mask_T.sum())), bool))
    garbage_T = jnp.where(mask_T, targets_T, -100)  # the ignore id of Hugging Face labels
    masked, grads = jax.jit(jax.value_and_grad(functools.partial(cross_entropy, chunk=4), has_aux=True))(
        hidden_TD, weight_DV, garbage_T, mask_T
    )
    np.testing.assert_allclose(masked, short, rtol=1e-6)
    np.testing.assert_array_equal(np.any(grads != 0, axis=-1), mask_T)
    nothing = jitted(hidden_TD, weight_DV, targets_T, jnp.zeros_like(mask_T))
    np.testing.assert_array_equal(nothing, [0.0, 0.0])


@pytest.mark.parametrize("tied", [False, True])
def test_a_sure_token_has_a_small_gradient_in_bfloat16(tied):
    # p = 0.999: one minus it is a thousandth, which is lost where p is rounded to bfloat16 first.
    hidden_TD, weight_DV = jnp.ones((1, 1, 1), jnp.bfloat16), jnp.asarray([[6.90625, 0.0]], jnp.bfloat16)
    chunked = functools.partial(cross_entropy, chunk=1)
    chunked = _of_table(chunked) if tied else chunked
    grad = jax.grad(lambda w: chunked(hidden_TD, w, jnp.zeros((1, 1), int), jnp.ones((1, 1), bool))[0])(weight_DV)
    np.testing.assert_allclose(grad.astype(jnp.float32), [[-1e-3, 1e-3]], rtol=0.01)


def test_cross_entropy_typed_out():
    # Uniform over four words: log 4 nats; argmax takes the first of equals, so one of two is right.
    loss, accuracy = cross_entropy(
        jnp.zeros((1, 2, 3)), jnp.ones((3, 4)), jnp.array([[0, 3]]), jnp.ones((1, 2), bool), chunk=1
    )
    np.testing.assert_allclose([loss, accuracy], [np.log(4.0), 0.5], rtol=1e-6)


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    hidden_TD, weight_DV = jnp.ones((1, 64, 4)), jnp.ones((4, 100))
    targets_T, mask_T = jnp.zeros((1, 64), int), jnp.ones((1, 64), bool)

    def loss(hidden_TD, weight_DV):
        logprobs_T, entropy_T = chunked_logprobs(hidden_TD, weight_DV, targets_T, jnp.ones((1, 64)), mask_T, chunk=8)
        nats, _ = cross_entropy(hidden_TD, weight_DV, targets_T, mask_T, chunk=8)
        return nats + jnp.sum(logprobs_T) + jnp.sum(entropy_T)

    # 8 * 100 for a chunk's logits; the whole would be 64 * 100.
    assert _largest_intermediate(jax.grad(loss, (0, 1)), hidden_TD, weight_DV) == 800
    plain = jax.grad(lambda *args: _plain_cross_entropy(*args, targets_T, mask_T)[0])
    assert _largest_intermediate(plain, hidden_TD, weight_DV) == 6400


@pytest.mark.parametrize("name", ["chunked_logprobs", "cross_entropy"])
def test_bfloat16_weight_gradient_is_summed_in_float32(name):
    # A bfloat16 sum of ones stalls at 256 (256 + 1 rounds to 256). One token per chunk is the worst
    # case.
    num_tokens = 1024
    hidden_TD = jnp.ones((1, num_tokens, 1), jnp.bfloat16)
    weight_DV = jnp.zeros((1, 2), jnp.bfloat16)
    targets_T, mask_T = jnp.zeros((1, num_tokens), jnp.int32), jnp.ones((1, num_tokens), bool)

    def loss(weight_DV):
        if name == "cross_entropy":
            return num_tokens * cross_entropy(hidden_TD, weight_DV, targets_T, mask_T, chunk=1)[0]
        ones_T = jnp.ones((1, num_tokens))
        return -jnp.sum(chunked_logprobs(hidden_TD, weight_DV, targets_T, ones_T, mask_T, chunk=1)[0])

    gradient = jax.jit(jax.grad(loss))(weight_DV)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(jnp.float32), [[-512.0, 512.0]])


def test_bfloat16_close_to_float32():
    args = _inputs(jnp.bfloat16)
    wide = args[0].astype(jnp.float32), args[1].astype(jnp.float32), *args[2:]
    chunked = functools.partial(cross_entropy, chunk=10)
    both = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))
    (loss, grads), (wide_loss, wide_grads) = both(*args), both(*wide)
    np.testing.assert_allclose(loss, wide_loss, rtol=1e-5)
    for grad, wide_grad in zip(grads, wide_grads, strict=True):
        _assert_close(grad.astype(jnp.float32), wide_grad, 1e-2)


def test_chunk_must_be_positive():
    hidden_TD, weight_DV, targets_T, mask_T = _inputs()
    with pytest.raises(ValueError, match="chunk must be at least 1 token; got 0"):
        cross_entropy(hidden_TD, weight_DV, targets_T, mask_T, chunk=0)
    with pytest.raises(ValueError, match="chunk must be at least 1 token; got -1"):
        chunked_logprobs(hidden_TD, weight_DV, targets_T, jnp.ones(mask_T.shape), mask_T, chunk=-1)

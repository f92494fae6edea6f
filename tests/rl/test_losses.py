"""Losses of policy and value model: typed-out numbers, and relations that hold for any."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
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

VOCAB = 31


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
    unclipped, stats = ppo_policy_loss(jnp.log(ratio), jnp.zeros(5), advantages, mask, clip=None, weights=weights)
    np.testing.assert_allclose(unclipped, -(1.25 + 2 * 1.5 - 0.5 * 0.75 - 0.7) / 4, rtol=1e-6)
    assert stats["clip_fraction"] == 0


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        ("step", ((1 + 2 + 3) / 3 + 6) / 2, [1 / 6, 1 / 6, 1 / 6, 1 / 2, 0]),
        ("token", (1 + 2 + 3 + 6) / 4, [1 / 4, 1 / 4, 1 / 4, 1 / 4, 0]),
        ("sequence", ((1 + 2 + 3) / 3 + 6) / 2, [1 / 6, 1 / 6, 1 / 6, 1 / 2, 0]),
        ("constant", (1 + 2 + 3 + 6) / 10 / 2, [1 / 20, 1 / 20, 1 / 20, 1 / 20, 0]),
    ],
)
def test_loss_means_typed_out(kind, value, gradient):
    """A trajectory (or step) of three tokens and one of one; the fifth token is a passage."""
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
    with pytest.raises(ValueError, match="token, step, sequence, constant; got 'batch'"):
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
    # A step of two tokens and one of one, each averaged first.
    by_step = functools.partial(loss_mean, shares=jnp.array([0.5, 0.5, 1.0, 0.0]), kind="step", length=1)
    averaged = value_loss(values, old_values, returns, mask, clip=0.2, mean=by_step)
    np.testing.assert_allclose(averaged, 0.5 * ((0.64 + 1.0) / 2 + 0.25) / 2, rtol=1e-6)


def test_kl_penalty():
    logprobs, ref_logprobs = jnp.array([-1.0, -1.0]), jnp.array([-1.0, -2.0])
    for kind, second in [("k1", 1.0), ("k2", 0.5), ("k3", np.exp(-1.0))]:
        np.testing.assert_allclose(kl_penalty(logprobs, ref_logprobs, kind), [0.0, second], rtol=1e-6)
    with pytest.raises(ValueError, match=r"k1, k2, k3; got 'k4'"):
        kl_penalty(logprobs, ref_logprobs, "k4")


def test_kl_estimates_are_unbiased():
    # Averaged over the policy's own distribution, k1 and k3 are the divergence itself.
    policy_V, ref_V = (jax.nn.log_softmax(tiny.normal(seed, VOCAB)) for seed in (1, 2))
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


@settings(max_examples=25, deadline=None, database=None)
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
    logits, ref_V = tiny.normal(1, VOCAB), jax.nn.log_softmax(jnp.linspace(-1, 1, VOCAB))
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

"""Truncation against sorting, with ties, and its two ways of finding a nucleus against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3rag_jax.config import RolloutConfig
from r3rag_jax.sampler import distribution
from r3rag_jax.sampler.distribution import WHOLE, Truncation, truncate


def kept(logits, how, target=None, temperature=1.0, can_branch=True):
    logits = jnp.asarray(logits, jnp.float32)
    temperature = jnp.full(logits.shape[:-1], temperature)
    return np.isfinite(
        jax.jit(functools.partial(truncate, how=how, can_branch=can_branch))(logits, temperature, target=target)
    )


def by_sorting(logits_V, how, temperature=1.0):
    """In float64, most likely first; tokens as likely as the last one kept are kept."""
    probs_V = np.exp((logits_V.astype(np.float64) - logits_V.max()) / temperature)
    keep_V = probs_V >= how.min_p
    ranked = np.sort(probs_V)[::-1]
    if how.top_k:
        keep_V &= probs_V >= ranked[min(how.top_k, len(ranked)) - 1]
        ranked = ranked[ranked >= ranked[min(how.top_k, len(ranked)) - 1]]
    if how.top_p < 1:
        keep_V &= probs_V >= ranked[np.argmax(np.cumsum(ranked) >= how.top_p * ranked.sum())]
    return keep_V


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Truncation(top_k=2), [1, 1, 0, 0]),
        (Truncation(top_k=3), [1, 1, 1, 1]),  # the third and the fourth are as likely as each other
        (Truncation(top_k=9), [1, 1, 1, 1]),
        (Truncation(top_p=0.39), [1, 0, 0, 0]),
        (Truncation(top_p=0.5), [1, 1, 0, 0]),
        (Truncation(top_p=0.75), [1, 1, 1, 1]),
        (Truncation(top_p=0.6, top_k=2), [1, 1, 0, 0]),  # .4 of the .7 left: 57 %
        (Truncation(top_p=0.55, top_k=2), [1, 0, 0, 0]),
        (Truncation(min_p=0.7), [1, 1, 0, 0]),
        (Truncation(min_p=0.3, top_k=1), [1, 0, 0, 0]),
    ],
)
def test_typed_out(how, expected):
    logits = np.log([0.4, 0.3, 0.15, 0.15])
    assert kept(logits, how).astype(int).tolist() == expected
    order = [2, 0, 3, 1]
    assert kept(logits[order], how).astype(int).tolist() == np.asarray(expected)[order].tolist()


@pytest.mark.parametrize("can_branch", [True, False])
@pytest.mark.parametrize("top_p", [1.0, 0.3, 0.95])
@pytest.mark.parametrize("top_k", [0, 1, 7, 400])
@pytest.mark.parametrize("min_p", [0.0, 0.05])
def test_equals_sorting(monkeypatch, min_p, top_k, top_p, can_branch):
    """Rows peaked and flat: a nucleus is found among the candidates, or behind them; every fifth token has a twin."""
    monkeypatch.setattr(distribution, "CANDIDATES", 16)
    logits = np.random.default_rng(0).normal(size=(6, 500)).astype(np.float32) * np.logspace(-1, 1, 6)[:, None]
    logits[:, ::5] = logits[:, 1::5]
    logits = logits.astype(np.float32)
    how = Truncation(min_p, top_k, top_p)
    for temperature in (1.0, 1.4):
        expected = [by_sorting(row, how, temperature) for row in logits]
        np.testing.assert_array_equal(kept(logits, how, temperature=temperature, can_branch=can_branch), expected)


def test_the_target_is_kept_and_gradients_flow_through_what_is():
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
    assert kept(logits, Truncation(top_k=1), target=np.int32(2)).tolist() == [True, False, True, False]
    grad = jax.grad(lambda x: jax.nn.log_softmax(truncate(x, jnp.float32(1), Truncation(top_p=0.6)))[0])(logits)
    np.testing.assert_allclose(grad, [3 / 7, -3 / 7, 0, 0], atol=1e-6)


def test_where_nothing_is_truncated_nothing_is_computed():
    args = jnp.zeros((2, 5)), jnp.ones(2)
    plain = str(jax.make_jaxpr(lambda logits, temperature: logits / temperature[..., None])(*args))
    for how in (WHOLE, Truncation.of(RolloutConfig()), Truncation(top_k=5)):
        assert str(jax.make_jaxpr(functools.partial(truncate, how=how))(*args)) == plain
    text = str(jax.make_jaxpr(functools.partial(truncate, how=Truncation(min_p=0.1)))(*args))
    assert "top_k" not in text and "exp" not in text

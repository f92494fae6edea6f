"""What advantages are made of: typed-out numbers, and a plain-Python reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3rag_jax.rl.advantages import (
    at_step_starts,
    discounts,
    ends,
    gae,
    group_mean_std,
    leave_one_out,
    token_shares,
    whiten,
)


def _reference_gae(rewards, values, discounts, mask, lam):
    """GAE as a loop over the kept tokens alone."""
    advantages = np.zeros(len(rewards))
    next_value = next_advantage = 0.0
    for t in reversed(np.flatnonzero(mask)):
        delta = rewards[t] + discounts[t] * next_value - values[t]
        next_advantage = advantages[t] = delta + discounts[t] * lam * next_advantage
        next_value = values[t]
    return advantages, np.where(mask, advantages + values, 0.0)


def _random_rows(num_rows=8, num_tokens=40):
    rng = np.random.default_rng(0)
    shape = num_rows, num_tokens
    return (
        rng.normal(size=shape).astype(np.float32),
        rng.normal(size=shape).astype(np.float32),
        rng.choice([0.0, 0.5, 0.9, 1.0], shape).astype(np.float32),
        rng.random(shape) > 0.4,
    )


def test_gae_typed_out():
    # delta = [0 + .5*.25 - .5, 0 + .5*.5 - .25, 1 - .5] = [-.375, 0, .5], each then + .25 of the
    # next
    advantages_T, returns_T = gae(
        jnp.array([0.0, 0.0, 1.0]),
        jnp.array([0.5, 0.25, 0.5]),
        jnp.array([0.5, 0.5, 0.0]),
        jnp.ones(3, bool),
        lam=0.5,
    )
    np.testing.assert_allclose(advantages_T, [-0.34375, 0.125, 0.5])
    np.testing.assert_allclose(returns_T, [0.15625, 0.375, 1.0])
    assert advantages_T.dtype == returns_T.dtype == jnp.float32


def test_gae_steps_over_passage_tokens():
    # The same three tokens with passages between: nothing may change, whatever the passages hold.
    nan = jnp.nan
    advantages_T, returns_T = gae(
        jnp.array([9.0, 0.0, nan, 9.0, 0.0, 1.0, 9.0]),
        jnp.array([nan, 0.5, nan, 7.0, 0.25, 0.5, nan]),
        jnp.array([nan, 0.5, 0.0, 1.0, 0.5, 0.0, nan]),
        jnp.array([False, True, False, False, True, True, False]),
        lam=0.5,
    )
    np.testing.assert_allclose(advantages_T, [0, -0.34375, 0, 0, 0.125, 0.5, 0])
    np.testing.assert_allclose(returns_T, [0, 0.15625, 0, 0, 0.375, 1.0, 0])


def test_gae_paper_setting_is_reward_to_go():
    # gamma = lambda = 1 (the paper): returns are the rewards still to come in the episode.
    _, returns_T = gae(
        jnp.array([0.5, 0.0, 0.0, 2.0]),
        jnp.array([0.3, -1.0, 0.2, 4.0]),
        jnp.array([1.0, 1.0, 1.0, 0.0]),
        jnp.ones(4, bool),
        lam=1.0,
    )
    np.testing.assert_allclose(returns_T, [2.5, 2.0, 2.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_gae_matches_the_loop_jitted_and_vmapped(lam):
    rows = _random_rows()
    advantages_BT, returns_BT = jax.jit(jax.vmap(lambda *row: gae(*row, lam=lam)))(*rows)
    for row in range(len(rows[0])):
        expected = _reference_gae(*(x[row] for x in rows), lam)
        np.testing.assert_allclose(advantages_BT[row], expected[0], atol=1e-5)
        np.testing.assert_allclose(returns_BT[row], expected[1], atol=1e-5)


def test_a_discount_of_0_separates_episodes():
    rewards_T, values_T, discounts_T, mask_T = (np.array(x[0]) for x in _random_rows())
    discounts_T[16], mask_T[16] = 0.0, True
    whole, _ = gae(rewards_T, values_T, discounts_T, mask_T, lam=0.9)
    parts = [gae(rewards_T[s], values_T[s], discounts_T[s], mask_T[s], lam=0.9)[0] for s in (slice(17), slice(17, 40))]
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-6)


def test_integer_rewards_do_not_truncate():
    # A peer's PPO kept rewards as int32 and lost every 0.7; whatever comes in, ours leave as
    # float32.
    advantages_T, _ = gae(
        jnp.array([0, 1]),
        jnp.array([0.0, 0.3]),
        jnp.array([1.0, 0.0]),
        jnp.ones(2, bool),
        lam=1.0,
    )
    np.testing.assert_allclose(advantages_T, [1.0, 0.7], rtol=1e-6)


def test_whiten():
    x = jnp.array([[1.0, 99.0], [3.0, jnp.nan]])
    mask = jnp.array([[True, False], [True, False]])
    np.testing.assert_allclose(whiten(x, mask), [[-1, 0], [1, 0]])
    np.testing.assert_array_equal(whiten(jnp.full((3,), 0.1), jnp.ones(3, bool)), np.zeros(3))
    np.testing.assert_array_equal(whiten(x, jnp.zeros_like(mask)), np.zeros((2, 2)))
    # Every trajectory malformed, each reward with its own rounding: two runs of one recipe went different ways.
    rounded = -1 + 1e-6 * jnp.array([1.0, -2.0, 1.0])
    np.testing.assert_array_equal(whiten(rounded, jnp.ones(3, bool)), np.zeros(3))


def test_leave_one_out_is_the_mean_of_the_others_from_the_same_step_on():
    returns = np.array([[3, 2, 9], [1, 1, 0], [5, 9, 9], [4, 4, 9]], np.float32)
    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]], bool)
    baseline = jax.jit(leave_one_out)(returns, mask, np.array([0, 0, 0, 1]))
    # question 1 has no other: the mean of the batch's others; nobody else has a third step
    want = [[(1 + 5) / 2, 1, 0], [(3 + 5) / 2, 2, 0], [(3 + 1) / 2, 0, 0], [(3 + 1 + 5) / 3, (2 + 1) / 2, 0]]
    np.testing.assert_allclose(baseline, want)
    assert baseline.dtype == jnp.float32


def test_group_mean_and_std():
    returns = np.array([[3, 2], [1, 1], [5, 9], [4, 4]], np.float32)
    mask = np.array([[1, 1], [1, 1], [1, 0], [1, 1]], bool)
    mean, std = jax.jit(group_mean_std)(returns, mask, np.array([0, 0, 0, 1]))
    np.testing.assert_allclose(mean, [[3, 1.5], [3, 1.5], [3, 0], [4, 4]])
    np.testing.assert_allclose(std, [[4**0.5, 0.5**0.5]] * 2 + [[4**0.5, 0], [0, 0]], rtol=1e-6)  # over n - 1


def test_discounts_ends_and_starts_of_steps():
    steps, mask = jnp.array([0, 0, 1, 1, 2, 0]), jnp.array([1, 1, 1, 1, 1, 0], bool)
    found = jax.jit(lambda s, m: discounts(s, m, gamma=0.9, step_discount=0.5))(steps, mask)
    np.testing.assert_allclose(found, [0.9, 0.45, 0.9, 0.45, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(ends(steps, mask), [0, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(at_step_starts(jnp.array([1, 2, 3, 4, 5, 6]), steps, mask, 4), [1, 3, 5, 0])


def test_token_shares_typed_out():
    steps, mask = jnp.array([[0, 0, 0, 1], [0, 2, 0, 0]]), jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    found = jax.jit(token_shares, static_argnums=2)(steps, mask, 3)
    np.testing.assert_allclose(found, [[1 / 3, 1 / 3, 1 / 3, 1], [1, 1, 0, 0]], rtol=1e-6)
    whole = token_shares(steps, mask, None)
    np.testing.assert_allclose(whole, [[1 / 4, 1 / 4, 1 / 4, 1 / 4], [1 / 2, 1 / 2, 0, 0]], rtol=1e-6)

"""Advantages: typed-out numbers, a plain-Python reference, and what must not leak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3rag_jax.rl.advantages import gae, group_baseline, whiten


def _reference_gae(rewards, values, continues, mask, gamma, lam):
    """GAE as a loop over episodes and, inside each, over its kept tokens only."""
    advantages = np.zeros(len(rewards))
    start = 0
    for end in range(len(rewards)):
        if continues[end] and end != len(rewards) - 1:
            continue
        next_value = next_advantage = 0.0
        for t in reversed([t for t in range(start, end + 1) if mask[t]]):
            delta = rewards[t] + gamma * next_value - values[t]
            next_advantage = advantages[t] = delta + gamma * lam * next_advantage
            next_value = values[t]
        start = end + 1
    return advantages, np.where(mask, advantages + values, 0.0)


def _random_rows(num_rows=8, num_tokens=40):
    rng = np.random.default_rng(0)
    shape = num_rows, num_tokens
    return (
        rng.normal(size=shape).astype(np.float32),
        rng.normal(size=shape).astype(np.float32),
        rng.random(shape) > 0.15,
        rng.random(shape) > 0.4,
    )


def test_gae_typed_out():
    # delta = [0 + .5*.25 - .5, 0 + .5*.5 - .25, 1 - .5] = [-.375, 0, .5], each then + .25 of the
    # next
    advantages_T, returns_T = gae(
        jnp.array([0.0, 0.0, 1.0]),
        jnp.array([0.5, 0.25, 0.5]),
        jnp.array([True, True, False]),
        jnp.ones(3, bool),
        gamma=0.5,
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
        jnp.array([True, True, True, True, True, True, False]),
        jnp.array([False, True, False, False, True, True, False]),
        gamma=0.5,
        lam=0.5,
    )
    np.testing.assert_allclose(advantages_T, [0, -0.34375, 0, 0, 0.125, 0.5, 0])
    np.testing.assert_allclose(returns_T, [0, 0.15625, 0, 0, 0.375, 1.0, 0])


def test_gae_paper_setting_is_reward_to_go():
    # gamma = lambda = 1 (the paper): returns are the rewards still to come in the episode.
    _, returns_T = gae(
        jnp.array([0.5, 0.0, 0.0, 2.0]),
        jnp.array([0.3, -1.0, 0.2, 4.0]),
        jnp.array([True, True, True, False]),
        jnp.ones(4, bool),
        gamma=1.0,
        lam=1.0,
    )
    np.testing.assert_allclose(returns_T, [2.5, 2.0, 2.0, 2.0], rtol=1e-6)


def test_gae_boundary_on_a_token_not_kept():
    # The first episode ends in a passage; its last kept token must not see the second episode.
    rewards_T, values_T = jnp.array([1.0, 0.0, 100.0]), jnp.array([0.0, 50.0, 50.0])
    mask_T = jnp.array([True, False, True])
    for continues_T in ([False, True, False], [True, False, False]):
        _, returns_T = gae(rewards_T, values_T, jnp.array(continues_T), mask_T, gamma=1.0, lam=1.0)
        np.testing.assert_allclose(returns_T, [1.0, 0.0, 100.0])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.5, 0.0)])
def test_gae_matches_the_loop_jitted_and_vmapped(gamma, lam):
    rows = _random_rows()
    batched = jax.jit(jax.vmap(lambda *row: gae(*row, gamma=gamma, lam=lam)))
    advantages_BT, returns_BT = batched(*rows)
    for row in range(len(rows[0])):
        expected = _reference_gae(*(x[row] for x in rows), gamma, lam)
        np.testing.assert_allclose(advantages_BT[row], expected[0], atol=1e-5)
        np.testing.assert_allclose(returns_BT[row], expected[1], atol=1e-5)


def test_gae_packed_row_equals_separate_rows():
    rewards_T, values_T, _, mask_T = (x[0] for x in _random_rows())
    continues_T = np.ones(40, bool)
    continues_T[[16, 39]] = False
    packed, _ = gae(rewards_T, values_T, continues_T, mask_T, gamma=0.9, lam=0.9)
    parts = [
        gae(rewards_T[s], values_T[s], continues_T[s], mask_T[s], gamma=0.9, lam=0.9)[0]
        for s in (slice(0, 17), slice(17, 40))
    ]
    np.testing.assert_allclose(packed, np.concatenate(parts), rtol=1e-6)


def test_integer_rewards_do_not_truncate():
    # A peer's PPO kept rewards as int32 and lost every 0.7; whatever comes in, ours leave as
    # float32.
    advantages_T, _ = gae(
        jnp.array([0, 1]),
        jnp.array([0.0, 0.3]),
        jnp.array([True, False]),
        jnp.ones(2, bool),
        gamma=1.0,
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


def test_group_baseline_is_the_mean_of_the_others_from_the_same_step_on():
    returns = np.array([[3, 2, 9], [1, 1, 0], [5, 9, 9], [4, 4, 9]], np.float32)
    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]], bool)
    baseline = group_baseline(returns, mask, np.array([0, 0, 0, 1]), num_groups=2)
    # question 1 has no other: the mean of the batch's others; nobody else has a third step
    want = [[(1 + 5) / 2, 1, 0], [(3 + 5) / 2, 2, 0], [(3 + 1) / 2, 0, 0], [(3 + 1 + 5) / 3, (2 + 1) / 2, 0]]
    np.testing.assert_allclose(baseline, want)
    assert baseline.dtype == jnp.float32

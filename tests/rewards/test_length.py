"""Soft overlong punishment: typed-out numbers."""

import numpy as np

from r3rag_jax.rewards.length import add_to_last_step, overlong_penalties


def test_overlong_penalties_typed_out():
    # L_max 100, L_cache 20, as in eq. 13 of arXiv 2503.14476.
    found = overlong_penalties([0, 80, 81, 90, 100, 101], limit=100, share=0.2)
    np.testing.assert_allclose(found, [0, 0, -0.05, -0.5, -1, -1], rtol=1e-6)
    np.testing.assert_array_equal(overlong_penalties([1000], limit=100, share=0.0), [0])
    np.testing.assert_allclose(overlong_penalties([25, 100], limit=100, share=1.0), [-0.25, -1])


def test_the_penalty_is_added_to_the_last_step():
    rewards = [np.array([0.5, 2.0], np.float32), np.zeros(0, np.float32)]
    changed = add_to_last_step(rewards, np.array([-0.5, -1.0], np.float32))
    assert [x.tolist() for x in changed] == [[0.5, 1.5], []]
    assert rewards[0].tolist() == [0.5, 2.0]

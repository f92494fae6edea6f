"""The table of algorithms: it agrees with the configuration, and a row is all that an algorithm needs."""

from typing import get_args, get_type_hints

import jax.numpy as jnp
import numpy as np

from r3rag_jax.config import RLConfig
from r3rag_jax.config.rl import GROUPED
from r3rag_jax.rl.algorithms import ALGORITHMS, Algorithm, clipped_loss
from r3rag_jax.rl.estimator import estimate
from r3rag_jax.types import TrajectoryTable

TABLE = TrajectoryTable(
    indices=np.array([[0, 1], [2, 9]]),
    rewards=np.array([[0, 2], [-1, 0]], np.float32),
    step_ids=np.array([[0, 0], [0, 0]]),
    mask=np.array([[1, 1], [1, 0]], bool),
    groups=np.array([0, 0]),
)


def test_the_configuration_names_the_rows_of_the_table():
    assert set(get_args(get_type_hints(RLConfig)["algorithm"])) == set(ALGORITHMS)


def test_the_configuration_knows_which_algorithms_compare_samples():
    assert {name for name, algorithm in ALGORITHMS.items() if algorithm.is_grouped} == set(GROUPED)


def _signs(credit, config):
    return jnp.sign(credit.returns)


def test_an_algorithm_is_a_function_and_a_row(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "reinforce++", Algorithm(_signs, clipped_loss))
    config = RLConfig(algorithm="reinforce++", negative_weight=0.5)
    zeros = np.zeros((2, 2), np.float32)
    advantages, _ = estimate(zeros, zeros, TABLE.mask, TABLE, config, 1)
    # returns 2 2 | -1: signs 1 1 | -1, of mean 1/3 and deviation sqrt(8/9), and half of what is negative
    scale = (8 / 9) ** 0.5
    np.testing.assert_allclose(advantages, [[2 / 3 / scale, 2 / 3 / scale], [-4 / 3 / scale / 2, 0]], rtol=1e-5)


def test_the_policy_loss_has_the_bounds_of_the_configuration():
    """Ratios 1.5 and 0.5 of advantages 1 and -1: clipped to 1.3 and 0.8; a bound of 0 above is the one below."""
    logprobs, advantages, mask = jnp.log(jnp.array([1.5, 0.5])), jnp.array([1.0, -1.0]), jnp.ones(2, bool)

    def loss(**keys):
        config = RLConfig(algorithm="rloo", **keys)
        return ALGORITHMS["rloo"].policy_loss(
            logprobs, jnp.zeros(2), advantages, mask, config, weights=None, mean=lambda x, mask: jnp.mean(x)
        )[0]

    np.testing.assert_allclose(loss(clip=0.2, clip_high=0.3), -(1.3 - 0.8) / 2, rtol=1e-6)
    np.testing.assert_allclose(loss(clip=0.2), -(1.2 - 0.8) / 2, rtol=1e-6)

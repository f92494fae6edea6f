"""The critic: what it starts from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_training import VOCAB, rl_batch

from r3rag_jax.parallel.target import ONE_CPU
from r3rag_jax.training.state import new_critic

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


def test_a_new_critic_values_everything_at_zero_and_owns_its_model() -> None:
    policy, batch = tiny.decoder(VOCAB), rl_batch()
    for kind in ("head", "separate"):
        critic = new_critic(policy, kind)
        assert (critic.decoder is None) is (kind == "head")
        values = critic(batch, jnp.ones((*batch.tokens.shape, 32)), "none", ONE_CPU)
        assert values.shape == batch.tokens.shape and not values.any()
    assert critic.decoder is not policy
    np.testing.assert_array_equal(critic.decoder.embed[...], policy.embed[...])

"""The updates: one answer on every mesh, donation, learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny_training import (
    HEAD,
    RL,
    assert_close,
    flat,
    modules,
    one_device,
    rl_batch,
    rl_work,
    sft_batch,
    targets_like,
    targets_of,
)

from r3rag_jax.config import MeshConfig, ModelConfig, SFTConfig
from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.parallel.shardings import device_put_batch, tree_shardings
from r3rag_jax.training import optimizer
from r3rag_jax.training.state import init_state
from r3rag_jax.training.steps import make_rl_step, make_sft_step

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


def two_sft_updates(mesh: Mesh) -> tuple[Any, Any]:
    graphdefs, params = modules()
    tx = optimizer.sft_optimizer(SFTConfig(lr=1e-3, warmup=0.0), 4)
    state = init_state(mesh, params["policy"], tx)
    step = make_sft_step(mesh, graphdefs["policy"], tx, ModelConfig(), state)
    logs = []
    for _ in range(2):
        state, metrics = step(state, device_put_batch(mesh, sft_batch()))
        logs.append(metrics)
    return state, logs


def two_rl_updates(mesh: Mesh) -> tuple[Any, Any]:
    graphdefs, params = modules()
    tx = optimizer.rl_optimizer(RL)
    state = init_state(mesh, params, tx)
    step = make_rl_step(mesh, graphdefs, tx, ModelConfig(), RL, state)
    batch = device_put_batch(mesh, rl_batch())
    [targets], logs = targets_of(mesh, graphdefs, state.params, params["policy"], rl_work(), RL)
    for _ in range(2):
        state, metrics = step(state, batch, targets, jnp.float32(1.0))
        logs.append(metrics)
    return state, logs


@pytest.mark.parametrize("updates", [two_sft_updates, two_rl_updates], ids=["sft", "rl"])
def test_updates_on_a_mesh(updates: Callable[[Mesh], tuple[Any, Any]]) -> None:
    """Whole updates: state laid out by the table, metrics and parameters those of one device."""
    want_state, want_logs = jax.device_get(updates(one_device()))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    state, logs = updates(mesh)
    assert jax.tree.map(lambda x: x.sharding, state) == tree_shardings(mesh, state, PARAM_AXES)
    assert int(state.step) == 2
    assert_close(jax.device_get(logs), want_logs, rtol=1e-4)
    # Adam divides by the gradient's size: where that is rounding, so is the update. All but a few agree.
    difference, moved = np.abs(flat(state.params) - flat(want_state.params)), 2e-3
    assert np.mean(difference > 1e-2 * moved) < 1e-3


def test_the_state_is_donated_and_its_source_is_not() -> None:
    mesh = one_device()
    graphdefs, params = modules()
    tx = optimizer.sft_optimizer(SFTConfig(), 4)
    state = init_state(mesh, params["policy"], tx)
    step = make_sft_step(mesh, graphdefs["policy"], tx, ModelConfig(), state)
    step(state, device_put_batch(mesh, sft_batch()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params["policy"]))


def test_policy_and_critic_have_rates_of_their_own() -> None:
    config, mesh = RL.replace(critic=HEAD.replace(lr=0.0)), one_device()
    graphdefs, params = modules()
    tx = optimizer.rl_optimizer(config)
    step = make_rl_step(mesh, graphdefs, tx, ModelConfig(), config, init_state(mesh, params, tx))
    batch = device_put_batch(mesh, rl_batch())
    moved, still = (
        step(
            init_state(mesh, params, tx),
            batch,
            device_put_batch(mesh, targets_like(rl_batch())),
            jnp.float32(scale),
        )[0]
        for scale in (1.0, 0.0)
    )
    assert np.array_equal(flat(moved.params["critic"]), flat(params["critic"]))
    assert np.abs(flat(moved.params["policy"]) - flat(params["policy"])).max() == pytest.approx(1e-3, rel=1e-2)
    assert np.array_equal(flat(still.params), flat(params))

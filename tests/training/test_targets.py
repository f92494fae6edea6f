"""Before the first update: credit along a trajectory, the KL penalty, importance weights, what a critic explains."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_training import (
    RL,
    attempt,
    flat,
    modules,
    one_device,
    per_step_work,
    rl_batch,
    rl_grads,
    rl_work,
    samples,
    table_of,
    targets_of,
    two_steps,
    two_steps_work,
)

from r3rag_jax.config import CriticConfig, KLConfig, ModelConfig, RLConfig
from r3rag_jax.parallel.shardings import device_put_batch
from r3rag_jax.parallel.target import ONE_CPU
from r3rag_jax.training import optimizer
from r3rag_jax.training.batch import pack
from r3rag_jax.training.losses import rl_loss, rl_objective
from r3rag_jax.training.state import PreUpdate, init_state
from r3rag_jax.training.steps import make_rl_step
from r3rag_jax.training.targets import make_targets
from r3rag_jax.types import Sample

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


def test_without_a_critic_the_advantages_are_returns_and_the_loss_is_the_policys() -> None:
    graphdefs, params = ({"policy": part["policy"]} for part in modules())
    config = RLConfig(algorithm="rloo", kl=KLConfig(coef=0.0), entropy_coef=0.01, whiten_advantages=False)
    work = two_steps_work()
    [(batch, _)] = work[0]
    [targets], [_, stats] = targets_of(one_device(), graphdefs, params, params["policy"], work, config)
    np.testing.assert_allclose(targets.advantages, [[0, 2.5, 2.5, 0, 2, 2]], atol=1e-6)  # no other sample: no baseline
    assert targets.returns is None and targets.old_values is None
    assert stats == {}  # nothing is explained where nothing explains
    loss, metrics = rl_loss(graphdefs, params, batch, targets, config, "none", ONE_CPU)
    assert "value_loss" not in metrics
    assert float(loss) == pytest.approx(
        float(metrics["policy_loss"] - config.entropy_coef * metrics["entropy"]), rel=1e-6
    )
    tx = optimizer.rl_optimizer(config)
    state = init_state(one_device(), params, tx)
    step = make_rl_step(one_device(), graphdefs, tx, ModelConfig(), config, state)
    moved = step(
        state, device_put_batch(one_device(), batch), device_put_batch(one_device(), targets), jnp.float32(1.0)
    )[0]
    assert set(moved.params) == {"policy"}
    assert not np.array_equal(flat(moved.params), flat(params))


@pytest.mark.parametrize(("step_discount", "first"), [(1.0, 2.5), (0.5, 1.5), (0.0, 0.5)])
@pytest.mark.parametrize("protocol", ["tags", "steps"])
def test_credit_flows_along_a_trajectory_in_both_protocols(protocol: str, step_discount: float, first: float) -> None:
    """Also where its steps are samples of their own, in rows or batches of their own."""
    graphdefs, params = modules()
    blind = {"policy": params["policy"], "critic": jax.tree.map(jnp.zeros_like, params["critic"])}
    config = RLConfig(
        critic=CriticConfig(kind="head"), kl=KLConfig(coef=0.0), step_discount=step_discount, whiten_advantages=False
    )
    if protocol == "tags":
        work, want = two_steps_work(), [[[0, first, first, 0, 2, 2]]]
    else:
        work, want = per_step_work(), [[[0, first, first, 0, 0, 0]], [[0, 0, 0, 0, 2, 2]]]
    targets, _ = targets_of(one_device(), graphdefs, blind, params["policy"], work, config)
    for found, numbers in zip(targets, want, strict=True):
        np.testing.assert_allclose(found.returns, numbers, atol=1e-6)
        np.testing.assert_allclose(found.advantages, numbers, atol=1e-6)
        assert not np.asarray(found.old_values).any()


def changed_policy(params: Any) -> tuple[Any, np.ndarray]:
    """A reference policy, and its log-probabilities of the policy tokens 1, 2, 4, 5 of `two_steps`."""
    sample, _ = two_steps()
    reference = jax.tree.map(lambda x: 0.9 * x, params["policy"])
    policy = nnx.merge(modules()[0]["policy"], reference)
    positions = np.arange(6, dtype=np.int32)[None]
    logits = policy.logits(policy(sample.ids[None], positions, np.ones_like(positions)))
    return reference, np.asarray(jax.nn.log_softmax(logits)[0, np.arange(5), sample.ids[1:]])[[0, 1, 3, 4]]


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_the_kl_penalty_sits_on_every_token(estimator: str) -> None:
    """return of the last token = its reward - kl * (behaviour - reference log-probability)."""
    graphdefs, params = modules()
    reference, logprobs = changed_policy(params)
    config = RLConfig(
        critic=CriticConfig(kind="head"), kl=KLConfig(coef=0.1, estimator=estimator), whiten_advantages=False
    )
    blind = {"policy": params["policy"], "critic": jax.tree.map(jnp.zeros_like, params["critic"])}
    [targets], [metrics, _] = targets_of(one_device(), graphdefs, blind, reference, two_steps_work(), config)
    difference = -2.0 - logprobs
    kl = difference if estimator == "k1" else difference**2 / 2
    np.testing.assert_allclose(targets.returns[0, 5], 2.0 - 0.1 * kl[3], rtol=1e-5)
    np.testing.assert_allclose(targets.returns[0, 1], 2.5 - 0.1 * kl.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], difference.mean(), rtol=1e-5)
    assert targets.ref_logprobs is None


def test_a_kl_in_the_loss_leaves_the_rewards_alone_and_pulls_the_policy() -> None:
    work = two_steps_work()
    [(batch, _)] = work[0]
    graphdefs, params = modules()
    reference, logprobs = changed_policy(params)
    config = RLConfig(
        algorithm="rloo", kl=KLConfig(coef=0.1, placement="loss", estimator="k3"), whiten_advantages=False
    )
    graphdefs, params = {"policy": graphdefs["policy"]}, {"policy": params["policy"]}
    [targets], [metrics, _] = targets_of(one_device(), graphdefs, params, reference, work, config)
    np.testing.assert_allclose(targets.advantages, [[0, 2.5, 2.5, 0, 2, 2]], atol=1e-6)
    np.testing.assert_allclose(np.asarray(targets.ref_logprobs)[0, [1, 2, 4, 5]], logprobs, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], np.mean(-2.0 - logprobs), rtol=1e-5)

    def loss(params: Any, kl: float | None = None) -> Any:
        return rl_loss(graphdefs, params, batch, targets, config, "none", ONE_CPU, kl=kl)

    found, metrics = loss(params)
    np.testing.assert_allclose(found, metrics["policy_loss"] + 0.1 * metrics["kl_loss"], rtol=1e-6)
    np.testing.assert_allclose(loss(params, 2.0)[0], metrics["policy_loss"] + 2 * metrics["kl_loss"], rtol=1e-6)
    grads = {kl: flat(jax.grad(lambda p, kl=kl: loss(p, kl)[0])(params)) for kl in (0.0, 1.0, 3.0)}
    assert np.abs(grads[1.0] - grads[0.0]).max() > 1e-4
    np.testing.assert_allclose(grads[3.0] - grads[0.0], 3 * (grads[1.0] - grads[0.0]), atol=1e-5)
    # at the reference nothing pulls
    at_home = {kl: flat(jax.grad(lambda p, kl=kl: loss(p, kl)[0])({"policy": reference})) for kl in (0.0, 3.0)}
    np.testing.assert_allclose(at_home[3.0], at_home[0.0], atol=1e-5)


def test_truncated_weights_take_the_ratio_against_the_policy_before_the_update() -> None:
    """The sampler's log-probabilities are of another policy: whatever it is, the first ratio is 1 and nothing clips."""
    made = samples()
    batch = rl_batch()
    graphdefs, params = modules()
    config = RL.replace(max_importance_weight=2.0, kl=KLConfig(coef=0.0))
    [targets], [metrics, _] = targets_of(one_device(), graphdefs, params, params["policy"], rl_work(), config)
    ratio = np.exp(np.asarray(targets.old_logprobs) - batch.behaviour_logprobs)[batch.loss_mask]
    np.testing.assert_allclose(np.asarray(targets.weights)[batch.loss_mask], np.minimum(ratio, 2.0), rtol=1e-5)
    np.testing.assert_allclose(metrics["truncated_fraction"], np.mean(ratio > 2), rtol=1e-5)
    assert 0.1 < metrics["truncated_fraction"] < 0.9 and len(made) > 1
    metrics, _ = rl_grads(one_device(), batch, targets, config=config)
    assert metrics["clip_fraction"] == 0 and abs(metrics["approx_kl"]) < 1e-8
    assert metrics["sampler_gap"] > 1
    np.testing.assert_allclose(
        metrics["policy_loss"], -np.mean(np.minimum(ratio, 2.0) * np.asarray(targets.advantages)[batch.loss_mask]),
        rtol=1e-4,
    )  # fmt: skip
    plain, _ = rl_grads(one_device(), batch, dataclasses.replace(targets, old_logprobs=None, weights=None))
    assert plain["clip_fraction"] > 0.5


def test_every_trajectory_counts_alike_in_a_sequence_mean_whatever_batches_its_steps_are_in() -> None:
    graphdefs, params = ({"policy": part["policy"]} for part in modules())
    config = RLConfig(algorithm="reinforce++", kl=KLConfig(coef=0.0), loss_aggregation="sequence")
    targets, _ = targets_of(one_device(), graphdefs, params, params["policy"], per_step_work(), config)
    np.testing.assert_allclose(targets[0].shares, [[0, 0.25, 0.25, 0, 0, 0]])
    np.testing.assert_allclose(targets[1].shares, [[0, 0, 0, 0, 0.25, 0.25]])


def test_every_step_counts_alike_in_a_step_mean() -> None:
    """Steps of three tokens and of one: the policy loss and the value loss of R3-RAG's code, typed out."""
    config = RLConfig(
        critic=CriticConfig(kind="head", value_clip=10.0), kl=KLConfig(coef=0.0), loss_aggregation="step",
        whiten_advantages=False, step_discount=0.0,
    )  # fmt: skip
    sample = Sample(np.arange(6), np.array([0, 1, 1, 1, 0, 1], bool), np.zeros(6), np.array([-1, 0, 0, 0, -1, 1]))
    work = [pack([sample], row_length=6)], [attempt(sample)], [np.array([0.5, 2.0], np.float32)]
    estimate = make_targets(one_device(), config, num_steps=2)
    values = jnp.asarray([[0, 0, 0, 0, 0, 1]], jnp.float32)
    [targets], _ = estimate([PreUpdate(values=values)], table_of(work), 0.0, (1, 6))
    np.testing.assert_allclose(targets.advantages, [[0, 0.5, 0.5, 0.5, 0, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(targets.shares, [[0, 1 / 3, 1 / 3, 1 / 3, 0, 1]], rtol=1e-6)
    [(batch, _)] = work[0]
    ratio = np.log([[1, 1.1, 1.0, 1.5, 1, 0.9]])  # of which 1.5 is clipped at 1.2
    _, metrics = rl_objective(ratio, np.zeros((1, 6)), values + 0.25, batch, targets, config)
    np.testing.assert_allclose(metrics["policy_loss"], -(0.5 * (1.1 + 1.0 + 1.2) / 3 + 0.9) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["value_loss"], 0.5 * (0.25**2 + 0.75**2) / 2, rtol=1e-5)


def test_a_critic_is_told_how_much_it_explains() -> None:
    config = RLConfig(critic=CriticConfig(kind="head"), kl=KLConfig(coef=0.0))
    estimate = make_targets(one_device(), config, num_steps=2)
    explained = []
    for values in ([0, 0, 0, 0, 0, 0], [0, 2.5, 2.5, 0, 2, 2]):
        found = [PreUpdate(values=jnp.asarray([values], jnp.float32))]
        _, metrics = estimate(found, table_of(two_steps_work()), 0.0, (1, 6))
        explained.append(float(metrics["explained_variance"]))
    np.testing.assert_allclose(explained, [0, 1], atol=1e-6)
    np.testing.assert_allclose(metrics["value"], 2.25)

"""`rl.preset`: advantages and losses of the papers' formulas, typed out, for responses of one step and of several."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_training import one_device

from r3rag_jax.config import CriticConfig, KLConfig, RLConfig
from r3rag_jax.rl.losses import kl_penalty
from r3rag_jax.training.batch import pack_iteration
from r3rag_jax.training.groups import has_zero_variance, number_groups
from r3rag_jax.training.losses import rl_objective
from r3rag_jax.training.state import PreUpdate
from r3rag_jax.training.targets import make_targets
from r3rag_jax.types import Question, Sample, Status, Step, Trajectory

# Tokens 1 2 3 | 4 | 5 of three samples a, b, c of one question; 6 | 7 8 of two samples d, e of another. Probability
# ratios new / old of each; all old log-probabilities are 0 and those of the reference -0.1.
RATIO = np.array([1, 1.25, 0.9, 1.0, 0.75, 1.3, 1.0, 1.0, 1.1], np.float32)
LENGTHS, QUESTIONS = (3, 1, 1, 1, 2), "qqqrr"
ONE_STEP = ([[1.0], [0.0], [0.0], [1.0], [1.0]], [[0, 0, 0], [0], [0], [0], [0, 0]])  # rewards, steps of the tokens
SEVERAL = ([[0.5, 1.5], [-1.0], [0.5], [1.0], [1.0, 0.0]], [[0, 0, 1], [0], [0], [0], [0, 1]])
REF_LOGPROB, OLD_VALUE, VALUE = -0.1, 0.5, 0.6


def loss_of(
    config: RLConfig, rewards: list[list[float]], steps: list[list[int]]
) -> tuple[np.ndarray, dict[str, float]]:
    """Advantages of tokens 1 to 8 (0 where they are in no batch), and the metrics of the one batch of an iteration."""
    trajectories, token = [], 1
    for name, length, step_ids in zip(QUESTIONS, LENGTHS, steps, strict=True):
        ids = np.array([0, *range(token, token + length)], np.int32)
        sample = Sample(ids, ids > 0, np.zeros(len(ids), np.float32), np.array([-1, *step_ids], np.int32))
        step = Step("", answer="x")
        trajectories.append(
            Trajectory(Question(name, "?", ("x",)), (step,) * (step_ids[-1] + 1), Status.ANSWERED, (sample,))
        )
        token += length
    given = [np.array(row, np.float32) for row in rewards]
    is_equal = has_zero_variance(given, number_groups(trajectories), totals=config.returns == "total")
    config = config.replace(row_length=16, batch_rows=1)
    packed = pack_iteration(trajectories, given, is_equal, config, np.random.default_rng(0))
    [batch] = packed.batches
    in_reward = config.kl.placement == "reward"
    ref_logprobs = np.full(batch.tokens.shape, REF_LOGPROB, np.float32)
    penalties = np.asarray(kl_penalty(batch.behaviour_logprobs, ref_logprobs, config.kl.estimator))
    found = PreUpdate(
        values=np.full(batch.tokens.shape, OLD_VALUE, np.float32) if config.algorithm == "ppo" else None,  # type: ignore
        penalties=penalties if in_reward else None,  # type: ignore[arg-type]
        ref_logprobs=None if in_reward or not config.kl.coef else ref_logprobs,  # type: ignore[arg-type]
    )
    estimate = make_targets(one_device(), config, num_steps=2)
    [targets], _ = estimate([found], packed.table, config.kl.coef, batch.tokens.shape)
    advantages = np.zeros(9)
    advantages[np.asarray(batch.tokens)] = np.asarray(targets.advantages)
    logprobs = np.log(RATIO[np.asarray(batch.tokens)])
    values = np.full(batch.tokens.shape, VALUE, np.float32) if config.algorithm == "ppo" else None
    _, metrics = rl_objective(logprobs, np.zeros_like(logprobs), values, batch, targets, config)  # type: ignore
    return advantages[1:], {name: float(x) for name, x in metrics.items()}


def k3(ratio: float) -> float:
    d = np.log(ratio) - REF_LOGPROB
    return np.exp(-d) - 1 + d


def test_grpo() -> None:
    """(R - mean) / std over n - 1; the mean of each response's mean; 0.04 of k3 in the loss, of all responses."""
    kl = ((k3(1.25) + k3(0.9) + k3(1)) / 3 + k3(0.75) + k3(1.3) + k3(1) + (k3(1) + k3(1.1)) / 2) / 5
    # R = 1 0 0: mean 1/3, variance ((2/3)^2 + 2 (1/3)^2) / 2 = 1/3. Clipped: 1.25 at 1.2, 0.75 at 0.8.
    high, low = (2 / 3) * 3**0.5, (-1 / 3) * 3**0.5
    advantages, metrics = loss_of(RLConfig(preset="grpo"), *ONE_STEP)
    np.testing.assert_allclose(advantages, [high, high, high, low, low, 0, 0, 0], rtol=1e-5, atol=1e-6)
    policy_loss = -((1.2 + 0.9 + 1.0) / 3 * high + 0.8 * low + 1.3 * low + 0 + 0) / 5
    np.testing.assert_allclose(metrics["policy_loss"], policy_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_loss"], kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], policy_loss + 0.04 * kl, rtol=1e-5)
    # R = 2 -1 0.5: mean 0.5, deviation ((1.5^2 + 1.5^2 + 0) / 2)^(1/2) = 1.5.
    advantages, metrics = loss_of(RLConfig(preset="grpo"), *SEVERAL)
    np.testing.assert_allclose(advantages, [1, 1, 1, -1, 0, 0, 0, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], -((1.2 + 0.9 + 1.0) / 3 - 0.8) / 5 + 0.04 * kl, rtol=1e-5)


def test_dr_grpo() -> None:
    """R - mean; the sum over tokens, divided by the responses and a constant; no KL."""
    advantages, metrics = loss_of(RLConfig(preset="dr_grpo", loss_length=10), *ONE_STEP)
    np.testing.assert_allclose(advantages, [2 / 3, 2 / 3, 2 / 3, -1 / 3, -1 / 3, 0, 0, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], -((1.2 + 0.9 + 1.0) * 2 - 0.8 - 1.3) / 3 / 10 / 5, rtol=1e-5)
    assert "kl_loss" not in metrics
    advantages, metrics = loss_of(RLConfig(preset="dr_grpo", loss_length=10), *SEVERAL)
    np.testing.assert_allclose(advantages, [1.5, 1.5, 1.5, -1.5, 0, 0, 0, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], -((1.2 + 0.9 + 1.0) * 1.5 - 0.8 * 1.5) / 10 / 5, rtol=1e-5)


def test_dapo() -> None:
    """GRPO's advantages; the second question teaches nothing and is left out; the mean over tokens, clipped higher."""
    high, low = (2 / 3) * 3**0.5, (-1 / 3) * 3**0.5
    advantages, metrics = loss_of(RLConfig(preset="dapo"), *ONE_STEP)
    np.testing.assert_allclose(advantages, [high, high, high, low, low, 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], -((1.25 + 0.9 + 1.0) * high + (0.8 + 1.3) * low) / 5, rtol=1e-5)
    advantages, metrics = loss_of(RLConfig(preset="dapo"), *SEVERAL)
    np.testing.assert_allclose(metrics["loss"], -((1.25 + 0.9 + 1.0) - 0.8) / 5, rtol=1e-5)
    config = RLConfig(preset="dapo")
    assert (config.clip, config.clip_high, config.max_resamples, config.overlong_share) == (0.2, 0.28, 10, 0.2)


def test_rloo() -> None:
    """R - mean of the others, R with 0.01 of k1 of its tokens; the sum over tokens without clipping; not whitened."""
    # R = 1 - 3/1000, -1/1000, -1/1000 | 1 - 1/1000, 1 - 2/1000.
    advantages, metrics = loss_of(RLConfig(preset="rloo"), *ONE_STEP)
    np.testing.assert_allclose(advantages, [0.998] * 3 + [-0.499, -0.499, 0.001, -0.001, -0.001], rtol=1e-4)
    loss = -((1.25 + 0.9 + 1.0) * 0.998 + (0.75 + 1.3) * -0.499 + 1.0 * 0.001 + (1.0 + 1.1) * -0.001) / 5
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert metrics["clip_fraction"] == 0
    # R = 1.997 -1.001 0.499.
    advantages, metrics = loss_of(RLConfig(preset="rloo"), *SEVERAL)
    np.testing.assert_allclose(advantages, [2.248] * 3 + [-2.249, 0.001, 0.001, -0.001, -0.001], rtol=1e-4, atol=1e-6)
    loss = -((1.25 + 0.9 + 1.0) * 2.248 + 0.75 * -2.249 + 1.3 * 0.001 + 1.0 * 0.001 + (1.0 + 1.1) * -0.001) / 5
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def test_reinforce_plus_plus() -> None:
    """R - the KL of this and all later tokens, whitened over all tokens of the iteration; their mean, clipped."""
    for work, returns in [
        (ONE_STEP, [0.997, 0.998, 0.999, -0.001, -0.001, 0.999, 0.998, 0.999]),
        (SEVERAL, [1.997, 1.998, 1.499, -1.001, 0.499, 0.999, 0.998, -0.001]),
    ]:
        advantages, metrics = loss_of(RLConfig(preset="reinforce++"), *work)
        a = (np.array(returns) - np.mean(returns)) / np.std(returns)
        np.testing.assert_allclose(advantages, a, rtol=1e-4, atol=1e-6)
        terms = np.minimum(RATIO[1:] * a, np.clip(RATIO[1:], 0.8, 1.2) * a)
        np.testing.assert_allclose(metrics["loss"], -terms.mean(), rtol=1e-4)


def test_ppo_of_the_paper() -> None:
    """R - V within each step, whitened over tokens; both losses the mean over steps of their means over tokens."""
    for work, returns, num_tokens in [
        (ONE_STEP, [0.997, 0.998, 0.999, -0.001, -0.001, 0.999, 0.998, 0.999], (3, 1, 1, 1, 2)),
        (SEVERAL, [0.498, 0.499, 1.499, -1.001, 0.499, 0.999, 0.999, -0.001], (2, 1, 1, 1, 1, 1, 1)),
    ]:
        advantages, metrics = loss_of(RLConfig(preset="ppo_paper"), *work)
        a = np.array(returns) - OLD_VALUE
        a = (a - a.mean()) / a.std()
        np.testing.assert_allclose(advantages, a, rtol=1e-4, atol=1e-6)
        terms = np.minimum(RATIO[1:] * a, np.clip(RATIO[1:], 0.8, 1.2) * a)
        errors = (VALUE - np.array(returns)) ** 2  # a value that moved by 0.1 is not clipped
        ends = np.cumsum(num_tokens)[:-1]
        policy_loss = -np.mean([part.mean() for part in np.split(terms, ends)])
        value_loss = 0.5 * np.mean([part.mean() for part in np.split(errors, ends)])
        np.testing.assert_allclose(metrics["policy_loss"], policy_loss, rtol=1e-4)
        np.testing.assert_allclose(metrics["value_loss"], value_loss, rtol=1e-4)
        np.testing.assert_allclose(metrics["loss"], policy_loss + value_loss, rtol=1e-4)


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo"])
def test_a_question_that_teaches_nothing_does_not_change_the_gradient_of_another(preset: str) -> None:
    """Leaving it out doubled the gradient of the tokens that were kept, and dropped its KL."""
    config = RLConfig(preset=preset)  # type: ignore[arg-type]
    _, metrics = loss_of(config, *ONE_STEP)
    _, dropped = loss_of(config.replace(drop_zero_variance=True), *ONE_STEP)
    np.testing.assert_allclose(dropped["policy_loss"], metrics["policy_loss"] * 5 / 3, rtol=1e-5)


def test_keys_beside_a_preset_win() -> None:
    config = RLConfig(preset="grpo", clip=0.1, kl=KLConfig(coef=0.001))
    assert (config.clip, config.kl.coef, config.kl.placement, config.kl.estimator) == (0.1, 0.001, "loss", "k3")
    assert config.replace(lr=1.0).kl == config.kl
    paper = RLConfig(preset="ppo_paper", critic=CriticConfig(kind="head", lr=1e-3))
    assert (paper.critic.kind, paper.critic.lr, paper.critic.gae_lambda, paper.algorithm) == ("head", 1e-3, 1.0, "ppo")
    assert RLConfig(preset="none") == RLConfig()

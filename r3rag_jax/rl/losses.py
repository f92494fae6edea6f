"""Losses of policy and value model, and the KL penalty, as functions of the tokens' log-probabilities.

All arrays of a call have one shape, whatever it is; masks are bool, True = keep; sums are computed in float32.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

# exp(20) is 5e8, far outside any clip range but finite: one outlier does not make a loss infinite.
_MAX_LOG_RATIO = 20.0


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of the kept entries, float32 scalar; 0 when nothing is kept."""
    total = jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0))
    return total / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def loss_mean(
    x: jax.Array,
    mask: jax.Array,
    shares: jax.Array,
    *,
    kind: Literal["token", "step", "sequence", "constant"],
    length: float,
) -> jax.Array:
    """Aggregates the tokens of a batch; n_i is the number of kept tokens of trajectory i, N the number of trajectories.

        token     sum_t x_t / sum_i n_i            tokens have equal weights (DAPO, arXiv 2503.14476, eq. 12)
        step      1/S sum_s 1/n_s sum_t x_t        the S steps have equal weights, n_s tokens each (the released code
                                                   of arXiv 2505.23794, where each step is a sample)
        sequence  1/N sum_i 1/n_i sum_t x_t        trajectories have equal weights (GRPO, arXiv 2402.03300, eq. 3)
        constant  1/N sum_i 1/length sum_t x_t     no bias towards short correct or long wrong trajectories
                                                   (Dr. GRPO, arXiv 2503.20783)

    A trajectory, or a step, whose tokens are spread over several batches counts in each for the share of its tokens
    there.

    Args:
        x: float [...], a value per token; may hold anything where not kept.
        mask: bool, same shape, True = keep.
        shares: float, same shape, 1 / n_i, the token's share of its whole trajectory; for `step` 1 / n_s, of its step.
        kind: which of the four.
        length: for `constant`, the number of tokens that a trajectory's sum is divided by.

    Returns:
        float32 scalar; 0 when nothing is kept.

    Raises:
        ValueError: kind is none of the four.
    """
    if kind == "token":
        return masked_mean(x, mask)
    if kind not in ("step", "sequence", "constant"):
        raise ValueError(f"kind of loss mean must be one of token, step, sequence, constant; got {kind!r}")
    shares = jnp.where(mask, shares.astype(jnp.float32), 0.0)
    num_sequences = jnp.sum(shares)  # or steps
    weights = jnp.where(mask, 1.0 / length, 0.0) if kind == "constant" else shares
    total = jnp.sum(weights * jnp.where(mask, x.astype(jnp.float32), 0.0))
    return total / jnp.where(num_sequences > 0, num_sequences, 1.0)


def ppo_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: float | None,
    clip_high: float | None = None,
    weights: jax.Array | None = None,
    mean: Callable[[jax.Array, jax.Array], jax.Array] = masked_mean,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped surrogate loss, - mean_t w_t min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip_high) A_t).

    rho_t = exp(logprobs_t - old_logprobs_t) (arXiv 1707.06347, eq. 7; two bounds: arXiv 2503.14476, eq. 10); the
    log-ratio is clipped to +-20, far outside any clip range.

    Args:
        logprobs: float [...], of the sampled tokens under the policy being trained.
        old_logprobs: same shape, under the policy that clipping keeps the trained one close to, at the same
            temperature: recorded while sampling, or recomputed before the first update and then used with the weights
            of `truncated_weights`.
        advantages: same shape; no gradient flows through them.
        mask: bool, same shape, True = keep; the other arrays may hold anything where not kept.
        clip: the ratio is clipped at 1 - clip; None: not at all, whatever clip_high is.
        clip_high: the ratio is clipped at 1 + clip_high; None: at 1 + clip.
        weights: float, same shape, without gradient; None: 1.
        mean: (values of tokens, mask) -> scalar, e.g. `loss_mean`.

    Returns:
        The scalar loss, and stats: `clip_fraction`, the share of kept tokens with a ratio outside of the clip range;
        `approx_kl`, the mean of rho - 1 - log rho, an estimate of KL(old, policy) in nats per token; and
        `displacement`, the mean log-ratio of tokens with a positive advantage: a policy that makes these less likely
        is about to collapse (likelihood displacement, arXiv 2410.08847).
    """
    log_ratio = jnp.where(mask, (logprobs - old_logprobs).astype(jnp.float32), 0.0)
    log_ratio = jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    low, high = (-jnp.inf, jnp.inf) if clip is None else (1 - clip, 1 + (clip if clip_high is None else clip_high))
    advantages = lax.stop_gradient(jnp.where(mask, advantages.astype(jnp.float32), 0.0))
    surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)
    if weights is not None:
        surrogate = surrogate * lax.stop_gradient(jnp.where(mask, weights.astype(jnp.float32), 0.0))
    stats = {
        "clip_fraction": masked_mean((ratio < low) | (ratio > high), mask),
        "approx_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "displacement": masked_mean(log_ratio, mask & (advantages > 0)),
    }
    return -mean(surrogate, mask), lax.stop_gradient(stats)


def truncated_weights(
    old_logprobs: jax.Array, behaviour_logprobs: jax.Array, mask: jax.Array, limit: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Truncated importance weights min(pi_old / mu, limit) of tokens that were sampled from mu.

    mu is an older policy, or the same policy with the sampler's rounding. Truncation as in V-trace (arXiv 1802.01561,
    eq. 1); with ratios against pi_old in the surrogate loss this is the decoupled objective of arXiv 2110.00641.

    Args:
        old_logprobs: float [...], log pi_old of the sampled tokens, before the first update.
        behaviour_logprobs: same shape, log mu, recorded while sampling; both at the sampling temperature.
        mask: bool, same shape, True = keep; the other arrays may hold anything where not kept.
        limit: the largest weight.

    Returns:
        weights, float32 of the same shape, 0 where not kept, and stats: `weight`, their mean, and
        `truncated_fraction`, the share of kept tokens whose weight was limited.
    """
    log_ratio = jnp.where(mask, (old_logprobs - behaviour_logprobs).astype(jnp.float32), 0.0)
    ratio = jnp.exp(jnp.minimum(log_ratio, _MAX_LOG_RATIO))
    weights = jnp.where(mask, jnp.minimum(ratio, limit), 0.0)
    return weights, {"weight": masked_mean(weights, mask), "truncated_fraction": masked_mean(ratio > limit, mask)}


def value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    clip: float,
    mean: Callable[[jax.Array, jax.Array], jax.Array] = masked_mean,
) -> jax.Array:
    """Half the mean squared error of the values, or of the clipped values where their error is larger.

        1/2 mean_t max((V_t - R_t)^2, (V_old_t + clip(V_t - V_old_t, -clip, clip) - R_t)^2)

    Args:
        values: float [...], of the value model being trained.
        old_values: same shape, of the value model that the advantages were computed with.
        returns: same shape, regression targets.
        mask: bool, same shape, True = keep; the other arrays may hold anything where not kept.
        clip: a value that moves further from its old one gains nothing, in units of the reward; `inf`: no clipping.
        mean: (values of tokens, mask) -> scalar, e.g. `loss_mean`.

    Returns:
        The scalar loss.
    """
    values, old_values, returns = (jnp.where(mask, x.astype(jnp.float32), 0.0) for x in (values, old_values, returns))
    old_values, returns = lax.stop_gradient((old_values, returns))
    clipped = old_values + jnp.clip(values - old_values, -clip, clip)
    error = jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))
    return 0.5 * mean(error, mask)


def kl_penalty(logprobs: jax.Array, ref_logprobs: jax.Array, kind: Literal["k1", "k2", "k3"]) -> jax.Array:
    """Per-token estimate of KL(policy, reference) in nats, from tokens the policy sampled.

    With d = logprobs - ref_logprobs: k1 = d (unbiased, noisy; the penalty of PPO), k2 = d^2 / 2
    (low variance, biased), k3 = exp(-d) - 1 + d (unbiased, never negative; the KL loss of GRPO).
    As a loss, differentiated through `logprobs`: the gradient of k1 is 0 on average, so it has no effect; that of k2 is
    on average the gradient of KL(policy, reference), that of k3 the one of KL(reference, policy) (both for tokens
    sampled from the current policy).
    Source: J. Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: float [...], of the sampled tokens under the policy.
        ref_logprobs: same shape, under the reference policy.
        kind: which estimator.

    Returns:
        float32 of the same shape, unmasked.

    Raises:
        ValueError: kind is none of the three.
    """
    diff = (logprobs - ref_logprobs).astype(jnp.float32)
    if kind == "k1":
        return diff
    if kind == "k2":
        return 0.5 * jnp.square(diff)
    if kind == "k3":
        diff = jnp.clip(diff, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        return jnp.expm1(-diff) + diff
    raise ValueError(f"kind of KL estimate must be one of k1, k2, k3; got {kind!r}")


def adapted_kl(coefficient: float, kl: float, target: float, rate: float) -> float:
    """The next coefficient of a KL penalty: coefficient * (1 + rate * clip((kl - target) / target, -0.2, 0.2)).

    The proportional controller of arXiv 1909.08593, section 2.2, where the rate is 0.1.

    Args:
        coefficient: the current one.
        kl: measured, by any estimator and in any unit.
        target: in the same unit.
        rate: gain of the controller.
    """
    return coefficient * (1.0 + rate * min(max((kl - target) / target, -0.2), 0.2))

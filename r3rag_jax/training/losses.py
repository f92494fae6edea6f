"""The losses of SFT and RL as functions of parameters and a batch.

Alignment: everything about token t stands at index t, although it is computed from the hidden state of
token t - 1, which is what predicts it: logprobs[t], values[t] (the value of the state before t), rewards[t].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from r3rag_jax.config import RLConfig
from r3rag_jax.models.decoder import Decoder
from r3rag_jax.models.lora import join
from r3rag_jax.parallel.target import Target
from r3rag_jax.rl.algorithms import ALGORITHMS
from r3rag_jax.rl.losses import kl_penalty, loss_mean, masked_mean, value_loss
from r3rag_jax.rl.token_losses import chunked_logprobs, cross_entropy
from r3rag_jax.sampler.distribution import WHOLE, Truncation
from r3rag_jax.training.micro_batches import FULL_BATCH, BatchShare
from r3rag_jax.training.state import Metrics, Targets, hidden_states
from r3rag_jax.types import SFTBatch, TrainBatch

CPU_LOSS_CHUNK, ACCELERATOR_LOSS_CHUNK = 256, 512  # tokens whose logits exist at once, on a device


def sft_loss(
    graphdef: Any,
    params: Any,
    batch: SFTBatch,
    remat: str,
    target: Target,
    frozen: Any = None,
    share: BatchShare = FULL_BATCH,
) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy of the tokens in loss_mask.

    Args:
        target: the devices that the loss is compiled for; on several devices a shard, see `collectives.per_device`.
        params, frozen: what is trained of the policy and what is not, see `lora.TrainableSplit`.
        share: of a micro-batch or of a device's rows, for its contribution to the loss and metrics of the full batch.

    Returns:
        The scalar loss, and the metrics `loss` (nats per token) and `accuracy`.
    """
    policy = join(graphdef, params, frozen)
    weight, split = policy.output_shard(target)
    loss, accuracy = cross_entropy(
        hidden_states(policy, batch, remat, target),
        weight,
        batch.tokens,
        batch.loss_mask,
        chunk=_loss_chunk(target),
        tied=policy.config.tie_embeddings,
        target=target,
        split=split,
        share=share.tokens,
    )
    return loss, {"loss": loss, "accuracy": accuracy}


def rl_loss(
    graphdefs: dict[str, Any],
    params: Any,
    batch: TrainBatch,
    targets: Targets,
    config: RLConfig,
    remat: str,
    target: Target,
    truncation: Truncation = WHOLE,
    frozen: dict[str, Any] | None = None,
    kl: jax.Array | float | None = None,
    share: BatchShare = FULL_BATCH,
) -> tuple[jax.Array, Metrics]:
    """The forward passes over a batch, and their `rl_objective`.

    Args:
        graphdefs, params, frozen: by name, "policy" and perhaps "critic"; see `lora.TrainableSplit`.
        truncation: of the distribution that the batch was sampled from.
        kl: as of `rl_objective`.
        share, target: as of `sft_loss`.

    Returns:
        The scalar loss and metrics. `sampler_gap` is the largest difference between recorded and recomputed
        log-probabilities, which before the first update of an iteration is rounding alone.
    """
    modules = join_modules(graphdefs, params, frozen)
    logprobs, entropy, hidden = policy_logprobs(modules["policy"], batch, remat, truncation, target)
    values = modules["critic"](batch, hidden, remat, target) if "critic" in modules else None
    loss, metrics = rl_objective(logprobs, entropy, values, batch, targets, config, kl=kl, share=share)
    gap = jnp.abs(logprobs - batch.behaviour_logprobs)
    metrics["sampler_gap"] = jnp.max(jnp.where(batch.loss_mask, gap, 0.0))
    return loss, metrics


def rl_objective(
    logprobs: jax.Array,
    entropy: jax.Array,
    values: jax.Array | None,
    batch: TrainBatch,
    targets: Targets,
    config: RLConfig,
    *,
    kl: jax.Array | float | None = None,
    share: BatchShare = FULL_BATCH,
) -> tuple[jax.Array, Metrics]:
    """The algorithm's policy loss + KL - entropy bonus, each by `loss_mean`, + value loss (arXiv 1707.06347, eq. 9).

    The value loss is a mean over tokens, and with `loss_aggregation` step over steps, like the policy loss.

    Args:
        logprobs, entropy: float [B, L], of the policy being trained.
        values: float [B, L], of the critic; None without one.
        kl: weight of the KL in the loss; None: the configured one. Unused unless targets have ref_logprobs.
        share: as of `sft_loss`.

    Returns:
        The scalar loss and metrics.
    """
    mask = batch.loss_mask
    shares = jnp.zeros_like(logprobs) if targets.shares is None else targets.shares
    loss_share = share.tokens if config.loss_aggregation == "token" else share.sequences

    def mean(x: jax.Array, mask: jax.Array) -> jax.Array:
        return loss_share * loss_mean(x, mask, shares, kind=config.loss_aggregation, length=config.loss_length)

    policy_loss, metrics = ALGORITHMS[config.algorithm].policy_loss(
        logprobs,
        batch.behaviour_logprobs if targets.old_logprobs is None else targets.old_logprobs,
        targets.advantages,
        mask,
        config,
        weights=targets.weights,
        mean=mean,
    )
    metrics = {name: x * (share.gains if name == "displacement" else share.tokens) for name, x in metrics.items()}
    metrics |= {"policy_loss": policy_loss, "entropy": share.tokens * masked_mean(entropy, mask)}
    loss = policy_loss - config.entropy_coef * mean(entropy, mask)
    if targets.ref_logprobs is not None:
        ref_logprobs = jnp.where(mask, targets.ref_logprobs, 0.0)  # NaN has a gradient of NaN, also times 0
        metrics["kl_loss"] = mean(kl_penalty(logprobs, ref_logprobs, config.kl.estimator), mask)
        loss = loss + (config.kl.coef if kl is None else kl) * metrics["kl_loss"]
    if values is not None:
        assert targets.old_values is not None and targets.returns is not None
        value_mean = mean if config.loss_aggregation == "step" else lambda x, m: share.tokens * masked_mean(x, m)
        metrics["value_loss"] = value_loss(
            values, targets.old_values, targets.returns, mask, clip=config.critic.value_clip, mean=value_mean
        )
        loss = loss + config.critic.value_coef * metrics["value_loss"]
    return loss, metrics | {"loss": loss}


def join_modules(graphdefs: dict[str, Any], params: Any, frozen: dict[str, Any] | None) -> dict[str, Any]:
    """The modules by name, of their trained and frozen parameters."""
    return {name: join(graphdef, params[name], (frozen or {}).get(name)) for name, graphdef in graphdefs.items()}


def policy_logprobs(
    policy: Decoder, batch: TrainBatch, remat: str, truncation: Truncation, target: Target
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities and entropies at the sampling temperature, [B, L], and the hidden states they come from."""
    hidden = hidden_states(policy, batch, remat, target)
    weight, split = policy.output_shard(target)
    logprobs, entropy = chunked_logprobs(
        hidden,
        weight,
        batch.tokens,
        batch.temperature,
        batch.loss_mask,
        chunk=_loss_chunk(target),
        tied=policy.config.tie_embeddings,
        target=target,
        split=split,
        truncation=truncation,
    )
    return logprobs, entropy, hidden


def _loss_chunk(target: Target) -> int:
    return CPU_LOSS_CHUNK if target.is_cpu else ACCELERATOR_LOSS_CHUNK

"""The training steps: `sft_step` and `rl_step`, functional, jitted, donated, sharded over the mesh.

Alignment: everything about token t stands at index t, although it is computed from the hidden state of
token t - 1, which is what predicts it: logprobs[t], values[t] (the value of the state before t), rewards[t].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from r3rag_jax.config import ModelConfig, RLConfig, SFTConfig
from r3rag_jax.models.decoder import PARAM_AXES, Decoder
from r3rag_jax.models.lora import join
from r3rag_jax.rl.advantages import gae, whiten
from r3rag_jax.rl.distribution import WHOLE, Truncation
from r3rag_jax.rl.losses import (
    chunked_logprobs,
    cross_entropy,
    kl_penalty,
    masked_mean,
    ppo_policy_loss,
    value_loss,
)
from r3rag_jax.sharding import replicated, traced_on, tree_shardings
from r3rag_jax.types import SFTBatch, TrainBatch

Metrics = dict[str, jax.Array]
LOSS_CHUNK = 512  # tokens whose logits exist at once, per call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update changes."""

    step: jax.Array  # int32 [], updates done
    params: Any  # SFT: what is trained of the policy; RL: {"policy": ..., "critic": ...}, or without a critic
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What an RL update is trained towards, [B, L] float32, constants of the update."""

    advantages: jax.Array
    returns: jax.Array
    old_values: jax.Array


class Critic(nnx.Module):
    """V of the state before each token: a linear head on a value model's hidden states, or on the policy's."""

    def __init__(self, hidden_size: int, decoder: Decoder | None):
        self.decoder = decoder
        self.head = nnx.Param(jnp.zeros((hidden_size,), jnp.float32))

    def __call__(self, batch: TrainBatch, policy_hidden: jax.Array, remat: str) -> jax.Array:
        hidden = policy_hidden
        if self.decoder is not None:
            hidden = _hidden(self.decoder, batch, remat)
        return hidden.astype(jnp.float32) @ self.head[...]


def new_critic(policy: Decoder, kind: str) -> Critic:
    """A critic whose value model starts as the policy, with the same arrays, and whose head starts at zero."""
    return Critic(policy.config.hidden_size, nnx.merge(*nnx.split(policy)) if kind == "separate" else None)


def schedule(progress: Any, warmup: float, final: float) -> Any:
    """Share of the peak learning rate at `progress` in [0, 1]: linear warm-up, then cosine down to `final`."""
    rising = progress / max(warmup, 1e-9)
    falling = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * (progress - warmup) / max(1 - warmup, 1e-9)))
    return jnp.where(progress < warmup, rising, falling)


def sft_optimizer(config: SFTConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping; the schedule runs over the known number of steps."""
    return optax.chain(
        optax.clip_by_global_norm(config.grad_norm),
        optax.adamw(
            lambda count: config.lr * schedule((count + 1) / (num_steps + 1), config.warmup, 0.0),
            weight_decay=config.weight_decay,
        ),
    )


def rl_optimizer(config: RLConfig) -> optax.GradientTransformation:
    """Policy and critic each have a peak learning rate and a clipped gradient of their own.

    The schedule comes with each update (`lr_scale`): how many updates an iteration holds depends on how long
    its trajectories are.
    """

    def one(lr: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(config.grad_norm),
            optax.adamw(lr, b1=0.9, b2=0.95, eps=config.adam_eps, weight_decay=0.0),
        )

    return optax.multi_transform(
        {"policy": one(config.lr), "critic": one(config.critic_lr)},
        lambda params: {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in params.items()},
    )


def init_state(mesh: Mesh, params: Any, tx: optax.GradientTransformation) -> TrainState:
    """A fresh state, laid out on the mesh. `params` are copied: the state may be donated."""

    def build(params: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))

    shardings = tree_shardings(mesh, jax.eval_shape(build, params), PARAM_AXES)
    return jax.jit(build, out_shardings=shardings)(params)


def sft_loss(graphdef: Any, params: Any, batch: SFTBatch, remat: str, frozen: Any = None) -> tuple[jax.Array, Metrics]:
    """Token-mean cross-entropy of the tokens in loss_mask. `frozen`: see `lora.Parts`."""
    policy = join(graphdef, params, frozen)
    hidden = _previous(policy(batch.tokens, batch.positions, batch.segment_ids, remat=remat))
    loss, accuracy = cross_entropy(hidden, policy.output_weight(), batch.tokens, batch.loss_mask, chunk=LOSS_CHUNK)
    return loss, {"loss": loss, "accuracy": accuracy}


def rl_loss(
    graphdefs: dict[str, Any],
    params: Any,
    batch: TrainBatch,
    targets: Targets,
    config: RLConfig,
    remat: str,
    truncation: Truncation = WHOLE,
    frozen: dict[str, Any] | None = None,
) -> tuple[jax.Array, Metrics]:
    """PPO: clipped surrogate + value loss, where there is a critic, - entropy bonus (arXiv 1707.06347, eq. 9).

    `truncation` is what the batch was sampled with. `sampler_gap` is the largest difference between its recorded
    log-probabilities and today's: before the first update of an iteration nothing but rounding.
    """
    modules = _modules(graphdefs, params, frozen)
    logprobs, entropy, hidden = _logprobs(modules["policy"], batch, remat, truncation)
    policy_loss, metrics = ppo_policy_loss(
        logprobs, batch.behaviour_logprobs, targets.advantages, batch.loss_mask, clip=config.clip
    )
    metrics["policy_loss"] = policy_loss
    metrics["entropy"] = masked_mean(entropy, batch.loss_mask)
    loss = policy_loss - config.entropy * metrics["entropy"]
    if "critic" in modules:
        values = modules["critic"](batch, hidden, remat)
        metrics["value_loss"] = value_loss(
            values, targets.old_values, targets.returns, batch.loss_mask, clip=config.value_clip
        )
        loss = loss + config.value_coef * metrics["value_loss"]
    gap = jnp.abs(logprobs - batch.behaviour_logprobs)
    metrics["sampler_gap"] = jnp.max(jnp.where(batch.loss_mask, gap, 0.0))
    return loss, metrics | {"loss": loss}


def make_sft_step(
    mesh: Mesh, graphdef: Any, tx: optax.GradientTransformation, model: ModelConfig, state: TrainState
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted SFT update, (state, batch, frozen) -> (state, metrics); the state is donated."""

    def step(state: TrainState, batch: SFTBatch, frozen: Any = None) -> tuple[TrainState, Metrics]:
        return _update(lambda params: sft_loss(graphdef, params, batch, model.remat, frozen), tx, state, 1.0)

    return _jit_step(mesh, step, state)


def make_rl_step(
    mesh: Mesh,
    graphdefs: dict[str, Any],
    tx: optax.GradientTransformation,
    model: ModelConfig,
    config: RLConfig,
    state: TrainState,
    truncation: Truncation = WHOLE,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted PPO update, (state, batch, targets, lr_scale, frozen) -> (state, metrics); the state is donated."""

    def step(
        state: TrainState, batch: TrainBatch, targets: Targets, lr_scale: jax.Array, frozen: Any = None
    ) -> tuple[TrainState, Metrics]:
        def loss(params: Any) -> tuple[jax.Array, Metrics]:
            return rl_loss(graphdefs, params, batch, targets, config, model.remat, truncation, frozen)

        return _update(loss, tx, state, lr_scale)

    return _jit_step(mesh, step, state)


def make_scorer(
    mesh: Mesh,
    graphdefs: dict[str, Any],
    reference: Any,
    model: ModelConfig,
    config: RLConfig,
    truncation: Truncation = WHOLE,
) -> Callable[..., tuple[Targets, Metrics]]:
    """(params, reference policy's params, batch, frozen) -> targets before whitening, and metrics; jitted.

    `reference` is the reference policy's graphdef: that of the policy, without adapters.

    The KL penalty to the reference sits on every policy token's reward (k1, at the sampling temperature); then
    generalised advantage estimation runs along each row, with values of 0 where there is no critic. Only what is
    needed is evaluated.
    """

    def score(params: Any, ref_params: Any, batch: TrainBatch, frozen: Any = None) -> tuple[Targets, Metrics]:
        rewards, values, metrics = batch.rewards, jnp.zeros_like(batch.rewards), {}
        if "critic" in graphdefs:
            modules = _modules(graphdefs, params, frozen)
            values = modules["critic"](batch, _hidden(modules["policy"], batch, "none"), "none")
        if config.kl > 0:
            ref_policy = nnx.merge(reference, ref_params)
            ref_logprobs, _, _ = _logprobs(ref_policy, batch, "none", truncation)
            kl = kl_penalty(batch.behaviour_logprobs, ref_logprobs, "k1")
            rewards = rewards - config.kl * kl
            metrics["kl"] = masked_mean(kl, batch.loss_mask)
        estimate = functools.partial(gae, gamma=config.gamma, lam=config.lam)
        advantages, returns = jax.vmap(estimate)(rewards, values, batch.continues, batch.loss_mask)
        return Targets(advantages, returns, values), metrics

    return jax.jit(traced_on(mesh, score))


@jax.jit
def whiten_all(
    targets: list[Targets], masks: list[jax.Array], negative_weight: float = 1.0
) -> tuple[list[Targets], Metrics]:
    """Whiten the advantages over all batches of an iteration, weigh the negative ones; how much the critic explains.

    What did worse than expected pushes down every token it wrote, the right ones among them; they were nearly certain,
    so the push grows as they yield, and entropy rises. With `negative_weight` 0 only what did better is learnt
    (RAFT++, arXiv 2504.11343).
    """
    white = whiten(jnp.stack([t.advantages for t in targets]), jnp.stack(masks))
    white = jnp.where(white < 0, negative_weight * white, white)
    mask = jnp.stack(masks)
    returns, values = (jnp.stack([getattr(t, n) for t in targets]) for n in ("returns", "old_values"))
    mean = masked_mean(returns, mask)
    spread = masked_mean(jnp.square(returns - mean), mask)
    unexplained = masked_mean(jnp.square(returns - values - masked_mean(returns - values, mask)), mask)
    metrics = {"explained_variance": 1.0 - unexplained / jnp.maximum(spread, 1e-8), "value": masked_mean(values, mask)}
    return [dataclasses.replace(t, advantages=a) for t, a in zip(targets, white, strict=True)], metrics


def _modules(graphdefs: dict[str, Any], params: Any, frozen: dict[str, Any] | None) -> dict[str, Any]:
    return {name: join(graphdef, params[name], (frozen or {}).get(name)) for name, graphdef in graphdefs.items()}


def _hidden(policy: Decoder, batch: TrainBatch, remat: str) -> jax.Array:
    """[B, L, D]: at index t what predicts token t."""
    return _previous(policy(batch.tokens, batch.positions, batch.segment_ids, remat=remat))


def _logprobs(
    policy: Decoder, batch: TrainBatch, remat: str, truncation: Truncation
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities and entropies at the sampling temperature, [B, L], and the hidden states they are made of."""
    hidden = _hidden(policy, batch, remat)
    logprobs, entropy = chunked_logprobs(
        hidden,
        policy.output_weight(),
        batch.tokens,
        batch.temperature,
        batch.loss_mask,
        chunk=LOSS_CHUNK,
        truncation=truncation,
    )
    return logprobs, entropy, hidden


def _update(
    loss: Callable[[Any], Any], tx: optax.GradientTransformation, state: TrainState, lr_scale: Any
) -> tuple[TrainState, Metrics]:
    (_, metrics), grads = jax.value_and_grad(lambda params: loss(params), has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda update: update * lr_scale, updates)  # Adam's update is linear in its rate
    metrics["grad_norm"] = optax.tree.norm(grads)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics


def _jit_step(mesh: Mesh, step: Callable[..., Any], state: TrainState) -> Callable[..., Any]:
    shardings = tree_shardings(mesh, state, PARAM_AXES)
    return jax.jit(traced_on(mesh, step), donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def _previous(hidden_BLD: jax.Array) -> jax.Array:
    """At index t the hidden state that predicts token t; index 0 is never trained."""
    return jnp.pad(hidden_BLD[:, :-1], ((0, 0), (1, 0), (0, 0)))

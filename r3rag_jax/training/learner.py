"""The training steps: `sft_step` and `rl_step`, functional, jitted, donated, sharded over the mesh.

Alignment: everything about token t stands at index t, although it is computed from the hidden state of
token t - 1, which is what predicts it: logprobs[t], values[t] (the value of the state before t), rewards[t].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from r3rag_jax.config import ModelConfig, RLConfig
from r3rag_jax.models.decoder import PARAM_AXES, Decoder
from r3rag_jax.models.lora import join
from r3rag_jax.parallel.shardings import (
    batch_ways,
    device_put_batch,
    device_put_global,
    partition_spec,
    replicated,
    tree_shardings,
)
from r3rag_jax.parallel.target import ONE_CPU, Target
from r3rag_jax.rl.advantages import whiten_rewards
from r3rag_jax.rl.estimator import estimate
from r3rag_jax.rl.losses import kl_penalty, loss_mean, masked_mean, ppo_policy_loss, truncated_weights, value_loss
from r3rag_jax.rl.token_losses import chunked_logprobs, cross_entropy
from r3rag_jax.sampler.distribution import WHOLE, Truncation
from r3rag_jax.types import SFTBatch, TrainBatch, TrajectoryTable

Metrics = dict[str, jax.Array]
LOSS_CHUNK, ACCELERATOR_LOSS_CHUNK = 256, 512  # tokens whose logits exist at once, per call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update changes."""

    step: jax.Array  # int32 [], updates done
    params: Any  # SFT: what is trained of the policy; RL: {"policy": ..., "critic": ...}, or without a critic
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
    """What is known of a batch before an iteration's first update, [B, L] float32; None where nothing asks for it."""

    values: jax.Array | None = None  # of the critic
    penalties: jax.Array | None = None  # estimated KL to the reference, for the reward
    ref_logprobs: jax.Array | None = None  # under the reference, for the loss
    old_logprobs: jax.Array | None = None  # under the policy
    weights: jax.Array | None = None  # importance weights of what the sampler wrote


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What an RL update is trained towards, [B, L] float32, constants of the update."""

    advantages: jax.Array
    returns: jax.Array | None = None  # with a critic
    old_values: jax.Array | None = None  # with a critic
    shares: jax.Array | None = None  # 1 / number of the trajectory's policy tokens; not for token means
    ref_logprobs: jax.Array | None = None  # with a KL in the loss
    old_logprobs: jax.Array | None = None  # None: those that were recorded while sampling
    weights: jax.Array | None = None  # with old_logprobs


class Part(NamedTuple):
    """What a part of a batch holds of it, float32 []: sums, or their shares of the whole batch's."""

    tokens: Any = 1.0  # that are trained
    sequences: Any = 1.0  # trajectories, each by the share of its tokens; without targets.shares none
    gains: Any = 1.0  # tokens with a positive advantage


WHOLE_BATCH = Part()


class Critic(nnx.Module):
    """V of the state before each token: a linear head on a value model's hidden states, or on the policy's."""

    def __init__(self, hidden_size: int, decoder: Decoder | None):
        self.decoder = decoder
        self.head = nnx.Param(jnp.zeros((hidden_size,), jnp.float32))

    def __call__(self, batch: TrainBatch, policy_hidden: jax.Array, remat: str, target: Target) -> jax.Array:
        hidden = policy_hidden
        if self.decoder is not None:
            hidden = _hidden(self.decoder, batch, remat, target)
        return hidden.astype(jnp.float32) @ self.head[...]


def new_critic(policy: Decoder, kind: str) -> Critic:
    """A critic whose value model starts as the policy, with the same arrays, and whose head starts at zero."""
    return Critic(policy.config.hidden_size, nnx.merge(*nnx.split(policy)) if kind == "separate" else None)


def init_state(mesh: Mesh, params: Any, tx: optax.GradientTransformationExtraArgs) -> TrainState:
    """A fresh state, laid out on the mesh. `params` are copied: the state may be donated."""

    def build(params: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))

    shardings = tree_shardings(mesh, jax.eval_shape(build, params), PARAM_AXES)
    return jax.jit(build, out_shardings=shardings)(params)


def sft_loss(
    graphdef: Any,
    params: Any,
    batch: SFTBatch,
    remat: str,
    frozen: Any = None,
    part: Part = WHOLE_BATCH,
    target: Target = ONE_CPU,
) -> tuple[jax.Array, Metrics]:
    """Token-mean cross-entropy of the tokens in loss_mask. `frozen`: see `lora.Parts`.

    Of a part of a batch, what it adds to the loss and to the metrics of the whole.
    """
    policy = join(graphdef, params, frozen)
    hidden = _hidden(policy, batch, remat, target)
    loss, accuracy = cross_entropy(
        hidden,
        policy.output_weight(),
        batch.tokens,
        batch.loss_mask,
        chunk=_loss_chunk(target),
        tied=policy.config.tie_embeddings,
        target=target,
    )
    loss, accuracy = loss * part.tokens, accuracy * part.tokens
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
    kl: jax.Array | float | None = None,
    part: Part = WHOLE_BATCH,
    target: Target = ONE_CPU,
) -> tuple[jax.Array, Metrics]:
    """Clipped surrogate + KL - entropy bonus, each by `loss_mean`, + value loss (arXiv 1707.06347, eq. 9).

    The value loss is there with a critic, the KL with `rl.kl.placement=loss`, weighed by `kl`. `truncation` is what the
    batch was sampled with. `sampler_gap` is the largest difference between its recorded log-probabilities and today's:
    before the first update of an iteration nothing but rounding. Of a part of a batch, what it adds to the loss and to
    the metrics of the whole, but for `sampler_gap`.
    """
    modules, mask = _modules(graphdefs, params, frozen), batch.loss_mask
    logprobs, entropy, hidden = _logprobs(modules["policy"], batch, remat, truncation, target)
    shares = jnp.zeros_like(logprobs) if targets.shares is None else targets.shares
    share = part.tokens if config.loss_aggregation == "token" else part.sequences

    def mean(x: jax.Array, mask: jax.Array) -> jax.Array:
        return share * loss_mean(x, mask, shares, kind=config.loss_aggregation, length=config.loss_length)

    policy_loss, metrics = ppo_policy_loss(
        logprobs,
        batch.behaviour_logprobs if targets.old_logprobs is None else targets.old_logprobs,
        targets.advantages,
        mask,
        clip=config.clip,
        clip_high=config.clip_high or None,
        weights=targets.weights,
        mean=mean,
    )
    metrics = {name: x * (part.gains if name == "displacement" else part.tokens) for name, x in metrics.items()}
    metrics |= {"policy_loss": policy_loss, "entropy": part.tokens * masked_mean(entropy, mask)}
    loss = policy_loss - config.entropy_coef * mean(entropy, mask)
    if targets.ref_logprobs is not None:
        ref_logprobs = jnp.where(mask, targets.ref_logprobs, 0.0)  # 0 times the slope of NaN is NaN
        metrics["kl_loss"] = mean(kl_penalty(logprobs, ref_logprobs, config.kl.estimator), mask)
        loss = loss + (config.kl.coef if kl is None else kl) * metrics["kl_loss"]
    if "critic" in modules:
        assert targets.old_values is not None and targets.returns is not None
        values = modules["critic"](batch, hidden, remat, target)
        error = value_loss(values, targets.old_values, targets.returns, mask, clip=config.critic.value_clip)
        metrics["value_loss"] = part.tokens * error
        loss = loss + config.critic.value_coef * metrics["value_loss"]
    gap = jnp.abs(logprobs - batch.behaviour_logprobs)
    metrics["sampler_gap"] = jnp.max(jnp.where(mask, gap, 0.0))
    return loss, metrics | {"loss": loss}


def make_sft_step(
    mesh: Mesh, graphdef: Any, tx: optax.GradientTransformationExtraArgs, model: ModelConfig, state: TrainState
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted SFT update, (state, batch, frozen) -> (state, metrics); the state is donated."""
    target = Target.of(mesh)

    def step(state: TrainState, batch: SFTBatch, frozen: Any = None) -> tuple[TrainState, Metrics]:
        def loss(params: Any, batch: SFTBatch, part: Part) -> tuple[jax.Array, Metrics]:
            return sft_loss(graphdef, params, batch, model.remat, frozen, part, target)

        return _update(loss, tx, state, 1.0, _parts(mesh, (batch,), model.micro_tokens), target)

    return _jit_step(mesh, step, state)


def make_rl_step(
    mesh: Mesh,
    graphdefs: dict[str, Any],
    tx: optax.GradientTransformationExtraArgs,
    model: ModelConfig,
    config: RLConfig,
    state: TrainState,
    truncation: Truncation = WHOLE,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted RL update, (state, batch, targets, lr_scale, frozen, kl) -> (state, metrics); the state is donated."""
    target = Target.of(mesh)

    def step(
        state: TrainState, batch: TrainBatch, targets: Targets, lr_scale: jax.Array, frozen: Any = None, kl: Any = None
    ) -> tuple[TrainState, Metrics]:
        def loss(params: Any, batch: TrainBatch, targets: Targets, part: Part) -> tuple[jax.Array, Metrics]:
            return rl_loss(graphdefs, params, batch, targets, config, model.remat, truncation, frozen, kl, part, target)

        return _update(loss, tx, state, lr_scale, _parts(mesh, (batch, targets), model.micro_tokens), target)

    return _jit_step(mesh, step, state)


def make_scorer(
    mesh: Mesh,
    graphdefs: dict[str, Any],
    reference: Any,
    model: ModelConfig,
    config: RLConfig,
    truncation: Truncation = WHOLE,
) -> Callable[..., tuple[Scored, Metrics]]:
    """(params, reference policy's params, batch, frozen) -> what the estimator needs, and metrics; jitted.

    `reference` is the reference policy's graphdef: that of the policy, without adapters. Only what is needed is
    evaluated. All log-probabilities are at the sampling temperature. The metric `kl` is k1, whatever the penalty is;
    that of the sampled tokens under whoever sampled them.
    """

    target = Target.of(mesh)

    def score(params: Any, ref_params: Any, batch: TrainBatch, frozen: Any = None) -> tuple[Scored, Metrics]:
        modules, mask = _modules(graphdefs, params, frozen), batch.loss_mask
        values = penalties = ref_logprobs = old_logprobs = weights = hidden = None
        metrics: Metrics = {}
        if config.max_importance_weight > 0:
            old_logprobs, _, hidden = _logprobs(modules["policy"], batch, "none", truncation, target)
            most = config.max_importance_weight
            weights, stats = truncated_weights(old_logprobs, batch.behaviour_logprobs, mask, most)
            metrics |= stats
        if "critic" in modules:
            hidden = _hidden(modules["policy"], batch, "none", target) if hidden is None else hidden
            values = modules["critic"](batch, hidden, "none", target)
        if config.kl.coef > 0:
            ref_logprobs, _, _ = _logprobs(nnx.merge(reference, ref_params), batch, "none", truncation, target)
            metrics["kl"] = masked_mean(kl_penalty(batch.behaviour_logprobs, ref_logprobs, "k1"), mask)
            if config.kl.placement == "reward":
                penalties = kl_penalty(batch.behaviour_logprobs, ref_logprobs, config.kl.estimator)
                ref_logprobs = None
        return Scored(values, penalties, ref_logprobs, old_logprobs, weights), metrics

    # Whole on every device: credit flows between rows.
    return jax.jit(score, out_shardings=replicated(mesh))


def make_estimator(
    mesh: Mesh, config: RLConfig, *, num_steps: int
) -> Callable[[list[Scored], TrajectoryTable, float, tuple[int, int]], tuple[list[Targets], Metrics]]:
    """(what the scorer gave for each batch, table of their tokens, weight of the KL, (B, L)) -> targets, and metrics.

    `rl.advantages.estimate` over all trajectories of the iteration, whatever rows and batches their tokens lie in. With
    a critic also how much of the returns it explains. `num_steps`: most steps of a trajectory.
    """

    def on_table(scored: list[Scored], table: TrajectoryTable, kl: Any, shape: tuple[int, int]) -> Any:
        size = len(scored) * shape[0] * shape[1]

        def gather(name: str) -> jax.Array:
            if getattr(scored[0], name) is None:
                return jnp.zeros_like(table.rewards)
            flat = jnp.stack([getattr(s, name) for s in scored]).ravel()
            return jnp.where(table.mask, flat.at[table.places].get(mode="fill", fill_value=0), 0.0)

        def scatter(x_NT: jax.Array) -> list[jax.Array]:
            flat = jnp.zeros(size, jnp.float32).at[table.places].set(x_NT, mode="drop")
            return list(flat.reshape(len(scored), *shape))

        table = whiten_rewards(table) if config.whiten_rewards else table
        values, mask = gather("values"), table.mask & (table.places < size)
        advantages, returns = estimate(values, kl * gather("penalties"), mask, table, config, num_steps)
        targets = [Targets(a) for a in scatter(advantages)]
        metrics: Metrics = {}
        if config.has_critic:
            both = zip(targets, scatter(returns), scatter(values), strict=True)
            targets = [dataclasses.replace(t, returns=r, old_values=v) for t, r, v in both]
            spread = masked_mean(jnp.square(returns - masked_mean(returns, mask)), mask)
            error = returns - values
            unexplained = masked_mean(jnp.square(error - masked_mean(error, mask)), mask)
            metrics["explained_variance"] = 1.0 - unexplained / jnp.maximum(spread, 1e-8)
            metrics["value"] = masked_mean(values, mask)
        if config.loss_aggregation != "token":
            shares = jnp.where(mask, 1.0 / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1), 0.0)
            targets = [dataclasses.replace(t, shares=s) for t, s in zip(targets, scatter(shares), strict=True)]
        return targets, metrics

    jitted = jax.jit(on_table, static_argnums=3)

    def estimator(
        scored: list[Scored], table: TrajectoryTable, kl: float, shape: tuple[int, int]
    ) -> tuple[list[Targets], Metrics]:
        table = device_put_global(table, jax.tree.map(lambda _: replicated(mesh), table))
        targets, metrics = jitted(scored, table, np.float32(kl), shape)
        constants = ("ref_logprobs", "old_logprobs", "weights")
        targets = [
            dataclasses.replace(t, **{name: getattr(s, name) for name in constants})
            for t, s in zip(targets, scored, strict=True)
        ]
        return device_put_batch(mesh, targets), metrics

    return estimator


def _modules(graphdefs: dict[str, Any], params: Any, frozen: dict[str, Any] | None) -> dict[str, Any]:
    return {name: join(graphdef, params[name], (frozen or {}).get(name)) for name, graphdef in graphdefs.items()}


def _hidden(policy: Decoder, batch: SFTBatch, remat: str, target: Target) -> jax.Array:
    """[B, L, D]: at index t what predicts token t."""
    hidden = policy(batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids, remat=remat, target=target)
    return _previous(hidden)


def _logprobs(
    policy: Decoder, batch: TrainBatch, remat: str, truncation: Truncation, target: Target
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities and entropies at the sampling temperature, [B, L], and the hidden states they are made of."""
    hidden = _hidden(policy, batch, remat, target)
    logprobs, entropy = chunked_logprobs(
        hidden,
        policy.output_weight(),
        batch.tokens,
        batch.temperature,
        batch.loss_mask,
        chunk=_loss_chunk(target),
        tied=policy.config.tie_embeddings,
        target=target,
        truncation=truncation,
    )
    return logprobs, entropy, hidden


def _loss_chunk(target: Target) -> int:
    return LOSS_CHUNK if target.is_cpu else ACCELERATOR_LOSS_CHUNK


def _parts(mesh: Mesh, batch: Any, micro_tokens: int) -> tuple[int, Any]:
    """How many parts of whole rows a batch is computed in, and its arrays, [parts, rows, L] where that is above 1.

    As few as keep to `micro_tokens` on a device, or of one row each; every device works on rows of its own.
    """
    num_rows, length = batch[0].tokens.shape
    ways = batch_ways(mesh, num_rows)
    per_device = num_rows // ways
    most = max(1, micro_tokens // length) if micro_tokens else per_device
    num_parts = min(n for n in range(1, per_device + 1) if per_device % n == 0 and per_device // n <= most)

    def apart(x: jax.Array) -> jax.Array:
        x = x.reshape(ways, num_parts, -1, length).swapaxes(0, 1).reshape(num_parts, -1, length)
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(mesh, partition_spec(mesh, (None, "batch", None), x.shape))
        )

    return num_parts, batch if num_parts == 1 else jax.tree.map(apart, batch)


def _sums(batch: SFTBatch | TrainBatch, targets: Targets | None = None) -> Part:
    """Of a batch, or of all parts together."""
    mask = batch.loss_mask
    shares = gains = jnp.zeros(())
    if targets is not None:
        shares = gains if targets.shares is None else jnp.sum(jnp.where(mask, targets.shares, 0.0))
        gains = jnp.sum(mask & (targets.advantages > 0), dtype=jnp.float32)
    return Part(jnp.sum(mask, dtype=jnp.float32), shares, gains)


def _value_and_grad(
    loss: Callable[..., Any], params: Any, num_parts: int, batch: Any, target: Target
) -> tuple[Any, Any]:
    """((loss, metrics), gradients) of a batch, summed over its parts one after the other."""
    of_part = jax.value_and_grad(loss, has_aux=True)
    if num_parts == 1:
        return of_part(params, *batch, WHOLE_BATCH)
    whole = _sums(*batch)

    def add(total: Any, batch: Any) -> tuple[Any, None]:
        part = Part(*(mine / jnp.where(all_ > 0, all_, 1.0) for mine, all_ in zip(_sums(*batch), whole, strict=True)))
        found = of_part(params, *batch, part)
        summed = jax.tree.map(jnp.add, total, found)
        if "sampler_gap" in found[0][1]:
            summed[0][1]["sampler_gap"] = jnp.maximum(total[0][1]["sampler_gap"], found[0][1]["sampler_gap"])
        return summed, None

    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, params, *first, whole))
    return jax.lax.scan(add, zeros, batch, unroll=1 if target.can_branch else num_parts)[0]


def _update(
    loss: Callable[..., Any],
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    lr_scale: Any,
    parts: tuple[int, Any],
    target: Target,
) -> tuple[TrainState, Metrics]:
    """A step; one whose loss or gradient is NaN or infinite changes nothing but the count of steps."""
    (value, metrics), grads = _value_and_grad(loss, state.params, *parts, target)
    metrics["grad_norm"] = optax.tree.norm(grads)
    is_finite = jnp.isfinite(value) & jnp.isfinite(metrics["grad_norm"])
    updates, opt_state = tx.update(grads, state.opt_state, state.params, is_finite=is_finite)

    def moved(param: jax.Array, update: jax.Array) -> jax.Array:
        return jnp.where(is_finite, param + lr_scale * update, param)  # Adam's update is linear in its rate

    return TrainState(state.step + 1, jax.tree.map(moved, state.params, updates), opt_state), metrics


def _jit_step(mesh: Mesh, step: Callable[..., Any], state: TrainState) -> Callable[..., Any]:
    shardings = tree_shardings(mesh, state, PARAM_AXES)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def _previous(hidden_BLD: jax.Array) -> jax.Array:
    """At index t the hidden state that predicts token t; index 0 is never trained."""
    return jnp.pad(hidden_BLD[:, :-1], ((0, 0), (1, 0), (0, 0)))

"""The pytrees of training: what an update changes, what it reads, and the critic beside the policy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from r3rag_jax.models.decoder import PARAM_AXES, Decoder
from r3rag_jax.parallel.shardings import tree_shardings
from r3rag_jax.parallel.target import Target
from r3rag_jax.types import SFTBatch, TrainBatch

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update changes."""

    step: jax.Array  # int32 [], updates done
    params: Any  # SFT: the trained parameters of the policy; RL: {"policy": ..., "critic": ...}, or without a critic
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreUpdate:
    """Forward passes over a batch before an iteration's first update, float32 [B, L]; None where not needed."""

    values: jax.Array | None = None  # of the critic
    penalties: jax.Array | None = None  # estimated KL to the reference, for the reward
    ref_logprobs: jax.Array | None = None  # under the reference policy, for the loss
    old_logprobs: jax.Array | None = None  # under the policy
    weights: jax.Array | None = None  # importance weights, policy over sampler
    entropy: jax.Array | None = None  # of the policy, to be recorded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What an RL update is trained towards, float32 [B, L], constants of the update."""

    advantages: jax.Array
    returns: jax.Array | None = None  # with a critic
    old_values: jax.Array | None = None  # with a critic
    shares: jax.Array | None = None  # 1 / policy tokens of the trajectory, or of the step; not for token means
    ref_logprobs: jax.Array | None = None  # with a KL in the loss
    old_logprobs: jax.Array | None = None  # None: use the batch's behaviour_logprobs
    weights: jax.Array | None = None  # with old_logprobs


@dataclasses.dataclass
class RLProgress:
    """What RL changes from iteration to iteration."""

    state: Any  # TrainState; None while another one is being loaded in its place
    kl: float  # weight of the KL to the reference policy
    iteration: int = 0  # the next one; all before it are done


class Critic(nnx.Module):
    """V of the state before each token: a linear head on a value model's hidden states, or on the policy's."""

    def __init__(self, hidden_size: int, decoder: Decoder | None):
        self.decoder = decoder
        self.head = nnx.Param(jnp.zeros((hidden_size,), jnp.float32))

    def __call__(self, batch: TrainBatch, policy_hidden_BLD: jax.Array, remat: str, target: Target) -> jax.Array:
        """Return values, float32 [B, L]; `policy_hidden_BLD` are the policy's `hidden_states`."""
        hidden = policy_hidden_BLD if self.decoder is None else hidden_states(self.decoder, batch, remat, target)
        return hidden.astype(jnp.float32) @ self.head[...]


def new_critic(policy: Decoder, kind: str) -> Critic:
    """A critic whose value model starts as the policy, with the same arrays, and whose head starts at zero."""
    return Critic(policy.config.hidden_size, nnx.merge(*nnx.split(policy)) if kind == "separate" else None)


def hidden_states(policy: Decoder, batch: SFTBatch, remat: str, target: Target) -> jax.Array:
    """[B, L, D]: at index t the final hidden state of token t - 1, which predicts token t."""
    hidden = policy(batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids, remat=remat, target=target)
    return shift_right(hidden)


def shift_right(hidden_BLD: jax.Array) -> jax.Array:
    """Move everything one token on; index 0, which is never trained, becomes 0."""
    return jnp.pad(hidden_BLD[:, :-1], ((0, 0), (1, 0), (0, 0)))


def init_state(mesh: Mesh, params: Any, tx: optax.GradientTransformationExtraArgs) -> TrainState:
    """A fresh state, laid out on the mesh. `params` are copied: the state may be donated."""

    def build(params: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))

    shardings = tree_shardings(mesh, jax.eval_shape(build, params), PARAM_AXES)
    return jax.jit(build, out_shardings=shardings)(params)


def shapes_of(state: Any) -> Any:
    """Shapes, dtypes and shardings of a pytree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

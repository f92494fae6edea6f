"""What a phase keeps in the memory of each device, and whether that fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r3rag_jax.components import Components
from r3rag_jax.config import Config
from r3rag_jax.models import lora
from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.parallel.shardings import batch_ways, tree_shardings
from r3rag_jax.rewards.judge.factory import judge_memory
from r3rag_jax.rl.algorithms import ALGORITHMS
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.memory import MemoryPlan, bytes_per_device, plan
from r3rag_jax.sampler.ops import SamplerOps
from r3rag_jax.training import optimizer
from r3rag_jax.training.state import new_critic


def is_ahead(components: Components, phase: str) -> bool:
    """Whether the phase has a policy on the devices and is still to be done."""
    if phase == "eval":
        return not components.config.rollout.server.is_given
    return phase != "index" and not components.policy_dir(phase).exists()


def plan_memory(components: Components, phase: str) -> list[MemoryPlan]:
    """What the phase keeps on each device: what it starts from, what it trains, the sampler's cache.

    Two plans where the sampler has devices of its own.
    """
    config, mesh = components.config, components.mesh
    components.codec  # noqa: B018  # a tokenizer without the protocol's tags is told of first
    shapes = components.policy.param_shapes()

    def size(tree: Any) -> int:
        return bytes_per_device(tree, tree_shardings(mesh, tree, PARAM_AXES))

    def trained() -> Any:
        policy = components.policy.trainable(shapes_to_zeros(shapes))
        if phase == "sft":
            return policy.params, optimizer.sft_optimizer(config.sft, 1, config.model.moment_dtype).init(policy.params)
        params = {"policy": policy.params}
        if ALGORITHMS[config.rl.algorithm].needs_critic:
            whole = lora.join(policy.graphdef, policy.params, policy.frozen)
            params["critic"] = lora.split_trainable(new_critic(whole, config.rl.critic.kind), config.lora).params
        return params, optimizer.rl_optimizer(config.rl, config.model.moment_dtype).init(params)

    parts = {"weights" if phase == "eval" else "start" if phase == "sft" else "reference": size(shapes)}
    if (phase == "rl" and config.rewards.needs_judge) or (phase == "eval" and config.eval.judge):
        parts |= judge_memory(config.judge, mesh)
    if phase != "eval":
        params, moments = jax.eval_shape(trained)
        parts |= {"trained": size(params), "optimizer": size(moments)}
        if phase == "rl" and config.lora.rank:
            parts["merged"] = size(shapes)
    if phase == "sft":
        return [plan(mesh, parts)]
    rollout, sampler_mesh = config.rollout, components.sampler_mesh
    policy = jax.eval_shape(lambda: CachedDecoder.of(components.policy.new_decoder(), SamplerOps.of(sampler_mesh)))
    own = {"policy of rollouts": bytes_per_device(policy, policy.shardings(sampler_mesh, rollout.shard_weights))}
    if sampler_mesh is mesh:
        own = parts | own
    else:
        own = {"weights": bytes_per_device(shapes, tree_shardings(sampler_mesh, shapes, PARAM_AXES))} | own
    sampler = plan(
        sampler_mesh, own, components.policy.decoder_config, slots=rollout.slots, max_length=rollout.max_length,
        dtype=components.cache_dtype,
    )  # fmt: skip
    return [sampler] if sampler_mesh is mesh else [plan(mesh, parts), sampler]


def undivided(config: Config, mesh: Mesh, sampler_mesh: Mesh, phase: str) -> list[str]:
    """Settings of a phase by which devices work on the same rows instead of some each, as `key=value`."""
    batches = {"sft": ("sft.batch_rows", config.sft.batch_rows), "rl": ("rl.batch_rows", config.rl.batch_rows)}
    slots = ("rollout.slots", config.rollout.slots)
    asked = [(mesh, *batches[phase])] if phase in batches else []
    asked += [(sampler_mesh, *slots)] if phase in ("rl", "eval") and not config.rollout.server.is_given else []
    return [f"{key}={rows}" for on, key, rows in asked if on.size > on.shape["tensor"] and batch_ways(on, rows) == 1]


def memory_notices(components: Components, phase: str, plans: Sequence[MemoryPlan]) -> list[str]:
    """What a user should know before a phase begins (rich markup): its memory, and rows that each device repeats."""
    undivided_keys = undivided(components.config, components.mesh, components.sampler_mesh, phase)
    return [
        *(f"[dim]memory of {phase}: {planned}[/]" for planned in plans),
        *(
            f"[yellow]{key} does not divide by the devices of data and fsdp: each computes all rows[/]"
            for key in undivided_keys
        ),
    ]


def shapes_to_zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

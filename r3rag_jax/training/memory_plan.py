"""What a phase keeps in the memory of each device, counted before anything is allocated."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r3rag_jax.config import Config
from r3rag_jax.models import lora
from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.models.policy import Policy
from r3rag_jax.parallel.shardings import batch_ways, tree_shardings
from r3rag_jax.parallel.target import Target
from r3rag_jax.rewards.judge.factory import judge_memory
from r3rag_jax.rl.algorithms import ALGORITHMS
from r3rag_jax.rollout.context_limit import context_notices
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.kernels.cpu import kernels as cpu_kernels
from r3rag_jax.sampler.memory import MemoryPlan, bytes_per_device, plan
from r3rag_jax.sampler.ops import SamplerOps
from r3rag_jax.training import optimizer
from r3rag_jax.training.state import new_critic


def will_hold_policy(config: Config, run: RunDirectory, phase: str) -> bool:
    """Whether the phase is still to be done and will have a policy on the devices."""
    if phase == "eval":
        return not config.rollout.server.is_given
    return phase != "index" and not run.policy(phase).exists()


def plan_phases(
    config: Config, phases: Sequence[str], policy: Policy, mesh: Mesh, sampler_mesh: Mesh, kv_dtype: Any
) -> dict[str, list[MemoryPlan]]:
    """`plan_memory` of each phase.

    Raises:
        UserError: a device has too little memory.
    """
    plans = {name: plan_memory(config, name, policy, mesh, sampler_mesh, kv_dtype) for name in phases}
    for planned in itertools.chain(*plans.values()):
        planned.check()
    return plans


def plan_memory(
    config: Config, phase: str, policy: Policy, mesh: Mesh, sampler_mesh: Mesh, kv_dtype: Any
) -> list[MemoryPlan]:
    """Count what `sft`, `rl` or `eval` keeps on each device for as long as the phase runs.

    Args:
        sampler_mesh: where rollouts run; `mesh` itself, or a mesh of other devices.
        kv_dtype: of the sampler's KV cache.

    Returns:
        One plan, or one for each mesh where the sampler has devices of its own.
    """
    shapes = policy.param_shapes()

    def size(tree: Any, on: Mesh = mesh) -> int:
        return bytes_per_device(tree, tree_shardings(on, tree, PARAM_AXES))

    sizes = {{"sft": "start", "rl": "reference", "eval": "weights"}[phase]: size(shapes)}
    if (phase == "rl" and config.rewards.needs_judge) or (phase == "eval" and config.eval.judge):
        sizes |= judge_memory(config.judge, mesh)
    if phase != "eval":
        params, moments = jax.eval_shape(lambda: _trained(config, phase, policy, shapes))
        sizes |= {"trained": size(params), "optimizer": size(moments)}
        if phase == "rl" and config.lora.rank:
            sizes["merged"] = size(shapes)
    if phase == "sft":
        return [plan(mesh, sizes)]
    rollout = config.rollout
    cached = jax.eval_shape(lambda: CachedDecoder.of(policy.new_decoder(), SamplerOps.of(sampler_mesh)))
    sampler_sizes = {
        "policy of rollouts": bytes_per_device(cached, cached.shardings(sampler_mesh, rollout.shard_weights))
    }
    is_shared = sampler_mesh is mesh
    sampler = plan(
        sampler_mesh, (sizes if is_shared else {"weights": size(shapes, sampler_mesh)}) | sampler_sizes,
        policy.decoder_config, slots=rollout.slots, max_length=rollout.max_length, dtype=kv_dtype,
    )  # fmt: skip
    return [sampler] if is_shared else [plan(mesh, sizes), sampler]


def _trained(config: Config, phase: str, policy: Policy, shapes: Any) -> tuple[Any, Any]:
    """Trained parameters and optimizer state of `sft` or `rl`; to be traced for their shapes alone."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    module, moment_dtype = policy.trainable(zeros), config.model.moment_dtype
    if phase == "sft":
        return module.params, optimizer.sft_optimizer(config.sft, 1, moment_dtype).init(module.params)
    params = {"policy": module.params}
    if ALGORITHMS[config.rl.algorithm].needs_critic:
        decoder = lora.join(module.graphdef, module.params, module.frozen)
        params["critic"] = lora.split_trainable(new_critic(decoder, config.rl.critic.kind), config.lora).params
    return params, optimizer.rl_optimizer(config.rl, moment_dtype).init(params)


def indivisible_settings(config: Config, mesh: Mesh, sampler_mesh: Mesh, phase: str) -> list[str]:
    """Settings of a phase, as `key=value`, whose rows do not divide by the devices, which then all compute all rows."""
    rows: list[tuple[Mesh, str, int]] = []
    if phase == "sft":
        rows.append((mesh, "sft.batch_rows", config.sft.batch_rows))
    if phase == "rl":
        rows.append((mesh, "rl.batch_rows", config.rl.batch_rows))
    if phase in ("rl", "eval") and not config.rollout.server.is_given:
        rows.append((sampler_mesh, "rollout.slots", config.rollout.slots))
    return [f"{key}={num}" for on, key, num in rows if on.size > on.shape["tensor"] and batch_ways(on, num) == 1]


def notices(
    config: Config, phase: str, plans: Mapping[str, Sequence[MemoryPlan]], mesh: Mesh, sampler_mesh: Mesh
) -> list[str]:
    """What a user should know before a phase begins, as rich markup.

    Before the first phase that is whether contexts may be full, and before a phase with a plan its memory.
    """
    has_rollouts = {"rl", "eval"} & set(config.phases)
    found = context_notices(config) if phase == config.phases[0] and has_rollouts else []
    if phase not in plans:
        return found
    keys = indivisible_settings(config, mesh, sampler_mesh, phase)
    is_slow = phase == next(iter(plans)) and cpu_kernels.are_missing(Target.of(sampler_mesh))
    slow = "no C++ compiler that works (c++, g++, clang++ or $CXX): sampling takes some twice as long"
    return [
        *found,
        *([f"[yellow]{slow}[/]"] if is_slow else []),
        *(f"[dim]memory of {phase}: {planned}[/]" for planned in plans[phase]),
        *(f"[yellow]{key} does not divide by the devices of data and fsdp: each computes all rows[/]" for key in keys),
    ]

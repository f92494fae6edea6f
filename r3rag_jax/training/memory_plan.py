"""What a phase keeps in the memory of each device, counted before anything is allocated, and the rules of its rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r3rag_jax.config import Config
from r3rag_jax.errors import UserError
from r3rag_jax.models import lora
from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.models.policy import Policy
from r3rag_jax.parallel.processes import exists
from r3rag_jax.parallel.shardings import batch_devices, tree_shardings
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
from r3rag_jax.training.temporaries import estimated_temporaries


def will_hold_policy(config: Config, run: RunDirectory, phase: str) -> bool:
    """Whether the phase is still to be done and will have a policy on the devices. All processes must call."""
    if phase == "eval":
        return not config.rollout.server.is_given
    return phase != "index" and not exists(run.policy(phase))


class MemoryPlanner:
    """Plans the phases of a run, also on meshes and with settings that are only considered; shapes are traced once."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.shapes = policy.param_shapes()
        self._trained: dict[str, tuple[Any, Any]] = {}
        self._cached: dict[SamplerOps, Any] = {}
        self._counted: dict[tuple[str, Mesh], int] = {}

    def plan(
        self,
        config: Config,
        phase: str,
        mesh: Mesh,
        sampler_mesh: Mesh,
        kv_dtype: Any,
        device_bytes: int | None = None,
    ) -> list[MemoryPlan]:
        """Count what `sft`, `rl` or `eval` keeps on each device for as long as the phase runs.

        Args:
            config: with the model and the algorithm of the policy's; rows, slots and the like may be others.
            mesh: may consist of devices that this process does not have, if `device_bytes` is given.
            sampler_mesh: where rollouts run; `mesh` itself, or a mesh of other devices.
            kv_dtype: of the sampler's KV cache.
            device_bytes: memory of a device; None: what the devices say.

        Returns:
            One plan, or one for each mesh where the sampler has devices of its own.
        """
        decoder, rollout, is_shared = self.policy.decoder_config, config.rollout, sampler_mesh is mesh
        sizes, trained_bytes = self._sizes(config, phase, mesh)
        estimated = estimated_temporaries(config, decoder, mesh, trained_bytes)
        temporaries = {name: estimated[name] for name in {"sft": ("sft",), "rl": ("score", "rl"), "eval": ()}[phase]}
        if phase == "sft":
            return [plan(mesh, sizes, temporaries=temporaries, device_bytes=device_bytes)]
        cached = self._cached_decoder(SamplerOps.of(sampler_mesh))
        weights = {"sampler weights": bytes_per_device(cached, cached.shardings(sampler_mesh, rollout.shard_weights))}
        sampling = estimated_temporaries(config, decoder, sampler_mesh, 0)
        of_sampler = {name: sampling[name] for name in ("prefill", "decode")}
        before = sizes if is_shared else {"weights": self._size("weights", self.shapes, sampler_mesh)}
        sampler = plan(
            sampler_mesh, before | weights,
            decoder, slots=rollout.slots, max_length=rollout.max_length, dtype=kv_dtype,
            temporaries=(temporaries if is_shared else {}) | of_sampler, device_bytes=device_bytes,
        )  # fmt: skip
        if is_shared:
            return [sampler]
        return [plan(mesh, sizes, temporaries=temporaries, device_bytes=device_bytes), sampler]

    def _sizes(self, config: Config, phase: str, mesh: Mesh) -> tuple[dict[str, int], int]:
        """Bytes of the arrays of training by name, and of the trained parameters among them."""
        weights = self._size("weights", self.shapes, mesh)
        sizes = {{"sft": "start", "rl": "reference", "eval": "weights"}[phase]: weights}
        if (phase == "rl" and config.rewards.needs_judge) or (phase == "eval" and config.eval.asks_judge):
            sizes |= judge_memory(config.judge, mesh)
        if phase == "eval":
            return sizes, 0
        if phase not in self._trained:
            self._trained[phase] = jax.eval_shape(lambda: _trained(config, phase, self.policy, self.shapes))
        params, moments = self._trained[phase]
        trained_bytes = self._size(f"{phase} parameters", params, mesh)
        has_critic = phase == "rl" and "critic" in params
        critic = self._size("critic", params["critic"], mesh) if has_critic else 0
        sizes |= {"parameters": trained_bytes - critic} | ({"critic": critic} if critic else {})
        sizes |= {"optimizer": self._size(f"{phase} optimizer", moments, mesh)}
        if phase == "rl" and config.lora.rank:
            sizes["merged"] = weights
        return sizes, trained_bytes

    def _size(self, name: str, tree: Any, mesh: Mesh) -> int:
        """Bytes on one device; counted once for each name and mesh."""
        if (name, mesh) not in self._counted:
            self._counted[name, mesh] = bytes_per_device(tree, tree_shardings(mesh, tree, PARAM_AXES))
        return self._counted[name, mesh]

    def _cached_decoder(self, ops: SamplerOps) -> Any:
        if ops not in self._cached:
            self._cached[ops] = jax.eval_shape(lambda: CachedDecoder.of(self.policy.new_decoder(), ops))
        return self._cached[ops]


def plan_phases(
    config: Config, phases: Sequence[str], policy: Policy, mesh: Mesh, sampler_mesh: Mesh, kv_dtype: Any
) -> dict[str, list[MemoryPlan]]:
    """The memory plans of phases, by phase.

    Raises:
        UserError: a device has too little memory, or rows do not divide by the devices.
    """
    check_rows(config, phases, mesh, sampler_mesh)
    planner = MemoryPlanner(policy)
    plans = {name: planner.plan(config, name, mesh, sampler_mesh, kv_dtype) for name in phases}
    for planned in itertools.chain(*plans.values()):
        planned.check()
    return plans


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


def check_rows(config: Config, phases: Sequence[str], mesh: Mesh, sampler_mesh: Mesh) -> None:
    """Check that the rows of each phase divide by the devices of `data` and `fsdp`, which compute a share each.

    Raises:
        UserError: some do not; the message has the nearest that do, as `key=value`.
    """
    rows: dict[str, tuple[Mesh, int]] = {}
    if "sft" in phases:
        rows["sft.batch_rows"] = mesh, config.sft.batch_rows
    if "rl" in phases:
        rows["rl.batch_rows"] = mesh, config.rl.batch_rows
    if {"rl", "eval"} & set(phases) and not config.rollout.server.is_given:
        rows["rollout.slots"] = sampler_mesh, config.rollout.slots
    wrong = {name: (batch_devices(on), num) for name, (on, num) in rows.items() if num % batch_devices(on)}
    if not wrong:
        return
    ways = max(ways for ways, _ in wrong.values())
    nearest = " ".join(f"{name}={nearest_rows(num, ways)}" for name, (ways, num) in wrong.items())
    got = ", ".join(f"{name}={num}" for name, (_, num) in wrong.items())
    raise UserError(
        f"{' and '.join(wrong)} must divide by the {ways} devices of mesh.data * mesh.fsdp; got {got}; nearest: "
        f"{nearest} (or devices to mesh.tensor, or fewer devices)"
    )


def nearest_rows(num_rows: int, ways: int) -> int:
    """The multiple of `ways` nearest to a number of rows; of two, the larger one."""
    return max(1, (2 * num_rows + ways) // (2 * ways)) * ways


def notices(config: Config, phase: str, plans: Mapping[str, Sequence[MemoryPlan]], sampler_mesh: Mesh) -> list[str]:
    """What a user should know before a phase begins, as rich markup.

    Before the first phase that is whether contexts may be full, and before a phase with a plan its memory.
    """
    has_rollouts = {"rl", "eval"} & set(config.phases)
    found = context_notices(config) if phase == config.phases[0] and has_rollouts else []
    if phase not in plans:
        return found
    is_slow = phase == next(iter(plans)) and cpu_kernels.are_missing(Target.of(sampler_mesh))
    tight = "by estimate the temporaries do not fit; python -m r3rag_jax.compile has the compiler's numbers"
    slow = "no C++ compiler that works (c++, g++, clang++ or $CXX): sampling takes some twice as long"
    return [
        *found,
        *([f"[yellow]{slow}[/]"] if is_slow else []),
        *(f"[dim]memory of {phase}: {planned}[/]" for planned in plans[phase]),
        *(f"[yellow]{tight}[/]" for planned in plans[phase] if planned.is_tight),
    ]

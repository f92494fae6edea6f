"""`mesh.layout=auto`: chooses the mesh (data, fsdp, tensor) from devices, memory and model; and the settings nearest to
given ones with which a run fits."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r3rag_jax.config import Config, MeshConfig
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.policy import Policy
from r3rag_jax.parallel.mesh import Sizes, make_sampler_mesh, mesh_of, mesh_sizes, num_training_devices
from r3rag_jax.parallel.processes import on_process_0
from r3rag_jax.sampler.cache.kv_cache import default_kv_dtype
from r3rag_jax.sampler.memory import GIB, device_memory
from r3rag_jax.training.memory_plan import MemoryPlanner, nearest_rows

MAX_TENSOR = 8  # more makes products too narrow, and collectives of each layer too many
SHARE = 0.95  # of the memory, which a layout may plan to use, since temporaries are estimated


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that a layout is chosen for."""

    num: int  # those that train; the sampler's own come on top
    memory: int | None  # bytes of one; None: unknown
    mesh: Callable[[Sizes], Mesh]
    sampler_mesh: Callable[[Mesh], Mesh]  # of the training mesh
    kv_dtype: Callable[[Mesh], Any]  # of the sampler's mesh


@dataclasses.dataclass(frozen=True)
class Layout:
    """A chosen mesh, and why it was chosen."""

    sizes: Sizes
    reason: str

    def apply(self, config: MeshConfig) -> MeshConfig:
        """The section with these sizes."""
        data, fsdp, tensor = self.sizes
        return config.replace(layout="given", data=data, fsdp=fsdp, tensor=tensor)


def layout_of(config: Config) -> Layout | None:
    """The layout that `mesh.layout=auto` chooses for the devices of this run; None: the configuration gives one.

    All processes must call.

    Raises:
        UserError: `model.path` cannot be read, or the sampler leaves no devices.
    """
    if config.mesh.layout == "given":
        return None
    num = num_training_devices(config.mesh, jax.device_count())
    mesh_of_sizes = functools.cache(lambda sizes: mesh_of(jax.devices()[:num], sizes))
    whole = mesh_of_sizes((1, num, 1))
    policy = Policy(config.model, config.lora, whole, seed=config.seed)
    given = config.rollout.kv_dtype

    def kv_dtype(mesh: Mesh) -> Any:
        is_auto = given == "auto"
        return default_kv_dtype(config.model.dtype, policy.decoder_config, mesh) if is_auto else jnp.dtype(given)

    sampler_mesh_of = functools.cache(lambda mesh: make_sampler_mesh(config.mesh, mesh))
    devices = Devices(num, device_memory(whole), mesh_of_sizes, sampler_mesh_of, kv_dtype)
    phases = [phase for phase in config.phases if phase != "index"]

    def choose() -> list[Any]:
        layout = choose_layout(config, MemoryPlanner(policy), devices, phases)
        return [*layout.sizes, layout.reason]

    data, fsdp, tensor, reason = on_process_0(choose, "mesh.layout")  # hosts may have other amounts of memory
    return Layout((data, fsdp, tensor), reason)


def choose_layout(config: Config, planner: MemoryPlanner, devices: Devices, phases: Sequence[str]) -> Layout:
    """The simplest mesh whose rows divide and whose phases fit: little tensor parallelism, then little FSDP.

    If no mesh does both, that with divisible rows that needs the least memory; if rows divide on none, all FSDP.
    """
    found: list[tuple[int, Sizes]] = []
    for sizes in layouts(devices.num, planner.policy.decoder_config):
        if not _rows_divide(config, phases, sizes):
            continue
        peak = peak_bytes(config, planner, devices, sizes, phases)
        found.append((peak, sizes))
        if devices.memory is None or peak <= SHARE * devices.memory:
            return Layout(sizes, _reason(sizes, peak, devices, "the simplest mesh that fits"))
    if not found:
        return Layout((1, devices.num, 1), f"no mesh of {devices.num} devices divides the rows")
    peak, sizes = min(found)
    return Layout(sizes, _reason(sizes, peak, devices, "the least memory, for none fits"))


def layouts(num_devices: int, decoder: DecoderConfig) -> Iterator[Sizes]:
    """Meshes of a number of devices, the simplest first: by tensor, then by fsdp."""
    for tensor in _divisors(num_devices):
        if tensor > MAX_TENSOR or decoder.num_heads % tensor or decoder.ffn_size % tensor:
            continue
        for fsdp in _divisors(num_devices // tensor):
            if decoder.hidden_size % fsdp == 0:
                yield num_devices // tensor // fsdp, fsdp, tensor


def peak_bytes(
    config: Config, planner: MemoryPlanner, devices: Devices, sizes: Sizes, phases: Sequence[str]
) -> int:  # fmt: skip
    """Estimated bytes of the device and phase that need the most."""
    mesh = devices.mesh(sizes)
    sampler_mesh = devices.sampler_mesh(mesh)
    kv_dtype, memory = devices.kv_dtype(sampler_mesh), devices.memory or sys.maxsize
    plans = (planner.plan(config, phase, mesh, sampler_mesh, kv_dtype, memory) for phase in phases)
    return max((planned.peak_bytes for planned in itertools.chain(*plans)), default=0)


def nearest_fit(config: Config, planner: MemoryPlanner, devices: Devices, phases: Sequence[str]) -> list[str] | None:
    """Settings as `key=value`, nearest to the configuration, with which rows divide and the phases fit.

    Tried in the order of the number and the size of changes: micro-batches, sharded sampler weights, fewer slots,
    rematerialisation, another mesh. Rows change only as far as the mesh needs.

    Returns:
        The changed settings; none: the configuration itself fits; None: nothing that was tried does.
    """
    if devices.memory is None:
        return []
    memory, given = SHARE * devices.memory, mesh_sizes(config.mesh, devices.num)
    options = _options(config, phases)

    def trial(chosen: Sequence[dict[str, Any]], sizes: Sizes) -> tuple[dict[str, Any], bool]:
        changes = {key: value for option in chosen for key, value in option.items()}
        changes |= _row_changes(config, changes, phases, sizes)
        return changes, peak_bytes(_changed(config, changes), planner, devices, sizes, phases) <= memory

    meshes = sorted(
        layouts(devices.num, planner.policy.decoder_config),
        key=lambda sizes: (sizes != given, abs(sizes[2] - given[2]), -sizes[1]),
    )
    smallest = [option[-1] for option in options]
    meshes = [sizes for sizes in {given: None, **dict.fromkeys(meshes)} if trial(smallest, sizes)[1]]
    counts = [*map(len, options), len(meshes)]
    steps = itertools.product(*map(range, counts))
    for *chosen, rank in sorted(steps, key=lambda ranks: (sum(1 for rank in ranks if rank), sum(ranks))):
        sizes = meshes[rank]
        changes, fits = trial([option[number] for option, number in zip(options, chosen, strict=True)], sizes)
        if fits:
            axes = zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), sizes, given, strict=True)
            moved = {key: size for key, size, was in axes if size != was}
            return [f"{key}={str(value).lower()}" for key, value in (moved | changes).items()]
    return None


def _options(config: Config, phases: Sequence[str]) -> list[list[dict[str, Any]]]:
    """For each kind of change the values that are tried, from the present one to the one of the least memory."""
    slots = [config.rollout.slots // share for share in (2, 4, 8) if config.rollout.slots >= share]
    length = max(config.sft.row_length, config.rl.row_length)
    micro = [length * rows for rows in (4, 2, 1)]
    micro = [tokens for tokens in micro if not config.model.micro_tokens or tokens < config.model.micro_tokens]
    samples = bool({"rl", "eval"} & set(phases))
    return [
        [{}, *({"model.micro_tokens": tokens} for tokens in micro)],
        [{}, *([{"rollout.shard_weights": True}] if samples and not config.rollout.shard_weights else [])],
        [{}, *([{"rollout.slots": number} for number in slots] if samples else [])],
        [{}, *([] if config.model.remat == "full" else [{"model.remat": "full"}])],
    ]


def _row_changes(config: Config, changes: dict[str, Any], phases: Sequence[str], sizes: Sizes) -> dict[str, int]:
    """The rows that must change because the mesh does not divide them."""
    ways = sizes[0] * sizes[1]
    rows = {}
    if "sft" in phases:
        rows["sft.batch_rows"] = config.sft.batch_rows
    if "rl" in phases:
        rows["rl.batch_rows"] = config.rl.batch_rows
    if {"rl", "eval"} & set(phases) and not config.mesh.sampler_devices:
        rows["rollout.slots"] = changes.get("rollout.slots", config.rollout.slots)
    return {key: nearest_rows(num, ways) for key, num in rows.items() if num % ways}


def _rows_divide(config: Config, phases: Sequence[str], sizes: Sizes) -> bool:
    return not _row_changes(config, {}, phases, sizes)


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with other values by dotted key."""
    by_section: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        by_section.setdefault(section, {})[name] = value
    return config.replace(**{name: getattr(config, name).replace(**values) for name, values in by_section.items()})


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _reason(sizes: Sizes, peak: int, devices: Devices, why: str) -> str:
    data, fsdp, tensor = sizes
    limit = "" if devices.memory is None else f" of {devices.memory / GIB:.1f}"
    return (
        f"mesh.data={data} mesh.fsdp={fsdp} mesh.tensor={tensor} on {math.prod(sizes)} devices: {why}, about "
        f"{peak / GIB:.1f}{limit} GiB per device"
    )

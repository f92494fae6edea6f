"""Programs for devices that XLA cannot compile for on this machine: calculated from sizes, not compiled.

Fully sharded weights are gathered once forward and once backward for each micro-batch, their gradients scattered once;
tensor parallelism adds two sums of activations a layer and direction. Operations are those of the model, a third more
where everything is rematerialised. Devices overlap the collectives of FSDP with products; those of `tensor` they wait
for. So do TPUs for reduce-scatters, unless these are over all devices: libtpu writes those as sums that it overlaps.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from r3rag_jax.compiling.chips import Topology
from r3rag_jax.compiling.estimate import Estimate
from r3rag_jax.compiling.programs import RunPrograms
from r3rag_jax.compiling.report import ProgramReport
from r3rag_jax.compiling.traffic import Collective, totals
from r3rag_jax.models.decoder import param_shapes
from r3rag_jax.parallel.shardings import batch_devices
from r3rag_jax.training.micro_batches import num_micro_batches

BYTES_OF_UPDATE = 28  # of HBM for a trained parameter: gradient, two moments and the parameter, read and written


def calculate_program(programs: RunPrograms, name: str, topology: Topology, temporaries: int) -> ProgramReport:
    """A report of a program that is not compiled. `temporaries`: by the memory plan."""
    config, chip = programs.config, topology.chip
    program, is_training = programs.make(name), name in ("sft", "rl")
    tokens = config.rollout.decode_chunk if name == "decode" else 1
    arguments = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(program.args)
        if getattr(leaf, "sharding", None) is not None
    )
    found = _collectives(programs, name)
    model_flops = programs.model_flops(name) / tokens
    flops = model_flops * (4 / 3 if is_training and config.model.remat == "full" else 1)
    trained = sum(map(math.prod, param_shapes(programs.policy.decoder_config).values())) / programs.mesh.size
    hbm_bytes = float(arguments - programs.looked_up_bytes(name)) + (BYTES_OF_UPDATE * trained if is_training else 0)

    def seconds(is_async: bool) -> float:
        of_kind = (item for item in found if item.is_async == is_async)
        return sum(item.wire_bytes / topology.link_rate(item.group_size) for item in of_kind)

    return ProgramReport(
        name=name, shape=program.name, is_compiled=False, fits=True, compile_s=0.0, temporaries=temporaries,
        arguments=arguments, looked_up=programs.looked_up_bytes(name), flops=flops, hbm_bytes=hbm_bytes,
        model_flops=model_flops, collectives=totals(found),
        largest_collectives=sorted(found, key=lambda item: -item.wire_bytes), copies=[],
        time=Estimate(max(flops / chip.flops, hbm_bytes / chip.hbm_rate), seconds(False), seconds(True)),
        peak_flops=chip.flops, hbm_rate=chip.hbm_rate,
    )  # fmt: skip


def _collectives(programs: RunPrograms, name: str) -> list[Collective]:
    config, decoder = programs.config, programs.policy.decoder_config
    mesh = programs.mesh if name in ("sft", "rl", "score") else programs.sampler_mesh
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    item = jnp.dtype(config.model.dtype).itemsize
    elements = sum(map(math.prod, param_shapes(decoder).values())) // tensor
    weights, gradients = elements * item, elements * 4  # gradients are summed in float32
    has_value_model = programs.model_flops("rl") > programs.model_flops("sft") * (
        config.rl.batch_rows * config.rl.row_length / config.sft.batch_rows / config.sft.row_length
    )
    models = 2 if has_value_model and name in ("rl", "score") else 1
    num_tokens, micro = _tokens(programs, name, batch_devices(mesh))
    is_training, layers = name in ("sft", "rl"), decoder.num_layers
    waits_for_scatters = programs.mesh.devices.flat[0].platform == "tpu" and fsdp < mesh.size
    found = []

    def add(kind: str, size: int, group: int, times: float, *, is_async: bool) -> None:
        if group > 1 and times:
            found.append(Collective(kind, kind, size, group, times, ("layers",), is_async, ""))

    is_gathered = name not in ("load", "prefill", "decode") or config.rollout.shard_weights
    gathers = (2 if is_training else 1) * micro * models * layers * is_gathered
    add("all-gather", weights // layers, fsdp, gathers, is_async=True)
    scatters = micro * models * layers * is_training
    add("reduce-scatter", gradients // layers, fsdp, scatters, is_async=not waits_for_scatters)
    add("all-reduce", gradients // fsdp, data, models * is_training, is_async=True)
    sums = {"sft": 4, "rl": 4, "score": 2, "load": 0, "prefill": 2, "decode": 2}[name]
    add("all-reduce", num_tokens * decoder.hidden_size * item, tensor, sums * layers * models * micro, is_async=False)
    if name == "load":
        add("all-gather", weights, fsdp, 1, is_async=False)
    return found


def _tokens(programs: RunPrograms, name: str, ways: int) -> tuple[int, int]:
    """Tokens of one device in one pass, and passes of a step."""
    config = programs.config
    if name == "decode":
        return config.rollout.slots // ways, 1
    if name not in ("sft", "rl", "score"):
        return programs.make(name).num_tokens // ways, 1
    rows, length = (
        (config.sft.batch_rows, config.sft.row_length)
        if name == "sft"
        else (config.rl.batch_rows, config.rl.row_length)
    )
    rows //= ways
    num = 1 if name == "score" else num_micro_batches(rows, length, config.model.micro_tokens)
    return rows // num * length, num

"""What a training step communicates: where its collectives are, in its trace and in the text compiled for a pod."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import AxisType, Mesh
from tiny_training import HEAD, RL, VOCAB

from r3rag_jax.compiling import hlo
from r3rag_jax.compiling.hlo import Array, Computation, Instruction, Program
from r3rag_jax.config import ModelConfig, SFTConfig
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import PARAM_AXES, Decoder
from r3rag_jax.parallel import blocks
from r3rag_jax.parallel.blocks import Blocks
from r3rag_jax.parallel.collectives import Dims
from r3rag_jax.parallel.mesh import AXES, make_mesh
from r3rag_jax.parallel.shardings import batch_shardings, tree_shardings
from r3rag_jax.parallel.target import Target
from r3rag_jax.training import losses, optimizer
from r3rag_jax.training.state import Targets, TrainState, new_critic
from r3rag_jax.training.steps import make_rl_step, make_sft_step
from r3rag_jax.types import SFTBatch, TrainBatch

COLLECTIVES = ("all_gather", "psum", "reduce_scatter", "all_to_all", "ppermute")
PROJECTIONS = 7  # of a layer


def place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def step_and_arguments(
    mesh: Mesh, phase: str, decoder: Decoder, model: ModelConfig, shape: tuple[int, int]
) -> tuple[Any, tuple[Any, ...]]:
    """The jitted step of a phase, and the shapes of its arguments on a mesh whose devices may not be here."""
    graphdef, params = nnx.split(decoder)
    ids, mask, number = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool_, jnp.float32))

    def state_of(params: Any, tx: Any) -> TrainState:
        state = jax.eval_shape(lambda p: TrainState(jnp.int32(0), p, tx.init(p)), params)
        return place(state, tree_shardings(mesh, state, PARAM_AXES))

    rows = SFTBatch(ids, ids, ids, None, mask)
    if phase == "sft":
        tx = optimizer.sft_optimizer(SFTConfig(), 100)
        state = state_of(params, tx)
        return make_sft_step(mesh, graphdef, tx, model, state), (state, place(rows, batch_shardings(mesh, rows)))
    critic = nnx.split(nnx.eval_shape(lambda: new_critic(decoder, "separate")))
    config, tx = RL.replace(critic=HEAD.replace(kind="separate")), optimizer.rl_optimizer(RL)
    state = state_of({"policy": params, "critic": critic[1]}, tx)
    numbers = {field.name: number for field in dataclasses.fields(TrainBatch)}
    batch = TrainBatch(**numbers | {f.name: getattr(rows, f.name) for f in dataclasses.fields(SFTBatch)})
    both = place(
        (batch, Targets(number, number, number)), batch_shardings(mesh, (batch, Targets(number, number, number)))
    )
    step = make_rl_step(mesh, {"policy": graphdef, "critic": critic[0]}, tx, model, config, state)
    return step, (state, *both, jax.ShapeDtypeStruct((), jnp.float32))


def equations(jaxpr: Any, loops: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """All equations of a traced program, each with the loops around it."""
    for equation in jaxpr.eqns:
        yield equation, loops
        inside = (*loops, equation) if equation.primitive.name in ("scan", "while") else loops
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, inside)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
@pytest.mark.parametrize("phase", ["sft", "rl"])
def test_what_a_step_gathers_and_where(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer at a time, and a block of the vocabulary at a time, in whose loop over tokens nothing is sent."""
    monkeypatch.setattr(losses, "CPU_LOSS_CHUNK", 8)  # several chunks of tokens for a block
    monkeypatch.setattr(blocks, "MAX_ELEMENTS", 1400)
    mesh = make_mesh(tiny.mesh_config(1, 4, 2))
    step, arguments = step_and_arguments(mesh, phase, tiny.decoder(VOCAB), ModelConfig(remat="full"), (8, 40))
    found = list(equations(step.trace(*arguments).jaxpr.jaxpr))
    sent = [(e.primitive.name, loops) for e, loops in found if e.primitive.name.startswith(COLLECTIVES)]
    assert {name for name, _ in sent} <= {"all_gather", "psum", "psum_invariant", "reduce_scatter"}
    both: Dims = ((0, ("tensor",)), (1, ("fsdp",)))  # of an embedding the second alone: devices look up what they have
    output, embedding = (Blocks.of((136, 8), 0, split, Target.of(mesh).shard()).num for split in (both, both[1:]))
    assert (output, embedding) == (7, 4)
    products = [loops for e, loops in found if e.primitive.name == "dot_general" and loops]
    token_loops = [loops for loops in products if len(loops) > 1 and loops[-2].params["length"] == output]
    assert token_loops
    assert not [name for name, loops in sent if any(of_tokens[-1] in loops for of_tokens in token_loops)]

    def sent_in(length: int, kind: str) -> int:
        return sum(name == kind for name, loops in sent if loops and loops[-1].params["length"] == length)

    layers, passes = 2, 1 if phase == "sft" else 2  # policy and critic
    assert sent_in(layers, "reduce_scatter") == PROJECTIONS * passes
    assert sent_in(layers, "all_gather") == 2 * PROJECTIONS * passes  # and once more in the backward pass
    assert sent_in(output, "reduce_scatter") == 2
    assert sent_in(output, "all_gather") == 2 * 2
    assert sent_in(embedding, "reduce_scatter") == sent_in(embedding, "all_gather") == passes


# A Qwen2.5 of two layers: small enough to compile in a minute, wide enough that XLA treats its matrices as large. The
# output matrix is three blocks.
QWEN_OF_TWO_LAYERS = DecoderConfig(
    vocab_size=98_304,
    hidden_size=2048,
    num_layers=2,
    num_heads=16,
    num_kv_heads=2,
    head_dim=128,
    ffn_size=4096,
    attention_bias=True,
    model_type="qwen2",
)


# libtpu writes a large reduce-scatter as a fused all-reduce that is padded to whole buffers: of [32768, 2048] over 4
# devices device k gets [8288, 2048], rows from 8288 k on and not from 8192 k, and the next device needs its last 288. A
# `collective-permute` sends those, 3 % of a shard. With xla_tpu_enable_all_reduce_scatter_fusion=false there is none,
# and an all-reduce that sends twice as much (libtpu 0.0.42.1).
FUSED_SCATTER = "all-reduce-scatter"


def arrays_sent(computation: Computation, instruction: Instruction) -> tuple[Array, ...]:
    """What a collective sends: its result, or of a fused reduce-scatter what is summed, without padding."""
    is_fused = computation.name.startswith(FUSED_SCATTER)
    return computation.parameters[0].result if is_fused else instruction.result


def is_rest(program: Program, computation: Computation, instruction: Instruction) -> bool:
    """Whether a collective hands on rows that a fused reduce-scatter has left on the neighbour, fewer than it pads."""
    if instruction.opcode != "collective-permute-start":
        return False
    rows = computation.instructions[instruction.operands[0]]
    shard = computation.instructions[rows.operands[0]]
    if rows.opcode != "slice" or not any(name.startswith(FUSED_SCATTER) for name in shard.called):
        return False
    fused = program.computations[shard.called[0]]
    [padded] = fused.of("all-reduce")
    return rows.num_bytes < padded.num_bytes - fused.parameters[0].num_bytes


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("phase", "sizes", "is_tied"), [("sft", (1, 16, 1), False), ("rl", (4, 4, 1), True), ("sft", (2, 2, 4), True)]
)
def test_what_a_step_for_a_pod_communicates(pod: Any, phase: str, sizes: tuple[int, int, int], is_tied: bool) -> None:
    """In the compiled text, where XLA may have moved, merged and rewritten what the step asks for."""
    mesh = Mesh(np.array(pod).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)
    config = dataclasses.replace(QWEN_OF_TWO_LAYERS, tie_embeddings=is_tied)
    decoder = nnx.eval_shape(
        lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, attention_implementation="splash")
    )
    step, arguments = step_and_arguments(mesh, phase, decoder, ModelConfig(remat="full"), (16, 4096))
    program = hlo.read(step.lower(*arguments).compile().as_text())
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
    executed = [(c, i, i.opcode.removesuffix("-start"), where) for c, i, where in program.executed()]
    sent = [(*it, arrays_sent(*it[:2])) for it in executed if it[2] in kinds and not is_rest(program, *it[:2])]
    assert {kind for _, _, kind, _, _ in sent} <= {"all-gather", "all-reduce", "reduce-scatter"}
    # Products with a block of the output matrix are in a loop over tokens, which is in the loop over blocks.
    width = config.vocab_size // 3
    products = [(i, where) for _, i, kind, where in executed if kind in ("convolution", "dot")]
    token_loops = {where.loops[-1] for i, where in products if width in i.result[0].dims and len(where.loops) > 1}
    assert token_loops
    assert not [i.name for _, i, _, where, _ in sent if token_loops & set(where.loops)]
    # Loops send a block, a layer's matrix, or over `tensor` activations.
    in_loops = [array for *_, where, arrays in sent if where.loops for array in arrays]
    blocks_sent = [array for array in in_loops if {width, width // sizes[2]} & set(array.dims)]
    others = [array.num_elements for array in in_loops if array not in blocks_sent]
    activations = 16 // (sizes[0] * sizes[1]) * 4096 * config.hidden_size
    assert blocks_sent and others
    assert max(array.num_elements for array in blocks_sent) <= blocks.MAX_ELEMENTS
    assert max(others) <= max(config.hidden_size * config.ffn_size // sizes[2], activations)
    assert max(array.num_elements for *_, arrays in sent for array in arrays) < config.hidden_size * config.vocab_size
    gathered = {i.result[-1].dtype for _, i, kind, where, _ in sent if kind == "all-gather" and where.loops}
    assert gathered == {"bf16"}

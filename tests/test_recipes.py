"""The recipes of 7 and 8 billion parameters: their constants, their models, and that every step of them traces.

`fixtures/` holds config.json of real models (Qwen/Qwen2.5-7B-Instruct, meta-llama/Llama-3.1-8B-Instruct and -70B-,
meta-llama/Llama-3.2-1B, Qwen/Qwen3-0.6B, HuggingFaceTB/SmolLM2-135M-Instruct), typed from public copies of them; what
the decoder reads agrees with those and with the published numbers of parameters, ids of special tokens are as known.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r3rag_jax.compiling.chips import parse_topology
from r3rag_jax.compiling.devices import devices_of, topology_mesh
from r3rag_jax.compiling.programs import Architecture
from r3rag_jax.config import Config, MeshConfig, load_config
from r3rag_jax.config.coldstart import TRAJECTORIES
from r3rag_jax.models.config import DecoderConfig, RopeScaling
from r3rag_jax.models.decoder import Decoder, param_shapes, rope_frequencies
from r3rag_jax.models.hf.decoder_files import hf_tensors
from r3rag_jax.parallel.mesh import make_mesh, make_sampler_mesh, mesh_sizes
from r3rag_jax.sampler.prefill_plan import ACCELERATOR_SHAPES
from r3rag_jax.sampler.programs import SamplerPrograms
from r3rag_jax.training import optimizer
from r3rag_jax.training.batch import pack
from r3rag_jax.training.memory_plan import MemoryPlanner, check_rows
from r3rag_jax.training.state import Targets, TrainState, new_critic
from r3rag_jax.training.steps import make_rl_step, make_sft_step
from r3rag_jax.training.targets import make_pre_update
from r3rag_jax.types import SFTBatch

TESTS = Path(__file__).parent
RECIPES = {"r3rag_qwen2.5_7b": "Qwen2.5-7B-Instruct", "r3rag_llama3.1_8b": "Llama-3.1-8B-Instruct"}
# Topology -> the budget of both recipes for it.
POD_BUDGETS = {"h100:8": "", "h100:2x8": "h100-2x8", "v5e-64": "v5e-64", "v6e-32": "v6e-32", "v5p-32": "v5p-32"}
PODS = [(name, topology, budget) for name in RECIPES for topology, budget in POD_BUDGETS.items()]
PODS += [("r3rag_qwen2.5_7b", "v5e-64", "grpo,v5e-64"), ("r3rag_llama3.1_70b", "v5p-128", "")]
SLOW_PODS = [pytest.param(*pod, marks=pytest.mark.slow if "8b" in pod[0] else ()) for pod in PODS]

# Tracing takes ten seconds a recipe, most of it the chunks of attention: one of the two always, both with -m slow.
TRACED = [pytest.param(*pair, marks=pytest.mark.slow if "llama" in pair[0] else ()) for pair in RECIPES.items()]


def recipe(name: str, budget: str = "") -> Config:
    return load_config(TESTS.parent / "configs" / f"{name}.yaml", [f"budget={budget}"])


def decoder_config(model: str) -> DecoderConfig:
    return DecoderConfig.from_hf(json.loads((TESTS / "fixtures" / f"{model}.json").read_text()))


# ------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("model", "expected", "num_params"),
    [
        (
            "Qwen2.5-7B-Instruct",
            DecoderConfig(
                vocab_size=152_064, hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128,
                ffn_size=18_944, rope_theta=1e6, norm_eps=1e-6, attention_bias=True, max_positions=32_768,
                model_type="qwen2",
            ),
            7_615_616_512,
        ),
        (
            "Llama-3.1-8B-Instruct",
            DecoderConfig(
                vocab_size=128_256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
                ffn_size=14_336, rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), norm_eps=1e-5,
                max_positions=131_072, model_type="llama",
            ),
            8_030_261_248,
        ),
        (
            "Llama-3.2-1B",
            DecoderConfig(
                vocab_size=128_256, hidden_size=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64,
                ffn_size=8192, rope_theta=5e5, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), norm_eps=1e-5,
                tie_embeddings=True, max_positions=131_072, model_type="llama",
            ),
            1_235_814_400,
        ),
        (
            "Qwen3-0.6B",
            DecoderConfig(
                vocab_size=151_936, hidden_size=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128,
                ffn_size=3072, rope_theta=1e6, norm_eps=1e-6, qk_norm=True, tie_embeddings=True, max_positions=40_960,
                model_type="qwen3",
            ),
            596_049_920,
        ),
        (
            "SmolLM2-135M-Instruct",
            DecoderConfig(
                vocab_size=49_152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
                ffn_size=1536, rope_theta=1e5, norm_eps=1e-5, tie_embeddings=True, max_positions=8192,
                model_type="llama",
            ),
            134_515_008,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_real_models_have_their_published_shapes(model: str, expected: DecoderConfig, num_params: int) -> None:
    config = decoder_config(model)
    assert config == expected
    assert sum(map(math.prod, param_shapes(config).values())) == num_params
    assert sum(math.prod(tensor.shape) for tensor in hf_tensors(config).values()) == num_params
    assert DecoderConfig.from_hf(config.to_hf()) == config


@pytest.mark.slow
def test_real_models_count_as_in_transformers() -> None:
    """The same fixtures, built by transformers on torch's meta device: names and shapes of every tensor."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    for file in sorted((TESTS / "fixtures").glob("*.json")):
        hf = json.loads(file.read_text())
        with torch.device("meta"):
            theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf))
        want = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
        assert {name: tensor.shape for name, tensor in hf_tensors(DecoderConfig.from_hf(hf)).items()} == want


def test_rotary_frequencies_of_llama_3_1_at_full_size() -> None:
    # H 128, theta 500,000, original context 8192: frequency i turns 8192 theta^(-i/64) / 2 pi times over it.
    scaled, plain = rope_frequencies(decoder_config("Llama-3.1-8B-Instruct")), 5e5 ** (-np.arange(64) / 64)
    turns = 8192 * plain / (2 * np.pi)
    assert (turns > 4).sum() == 29 and (turns < 1).sum() == 29
    np.testing.assert_allclose(scaled[:29], plain[:29], rtol=1e-6)
    np.testing.assert_allclose(scaled[-29:], plain[-29:] / 8, rtol=1e-6)
    between = (turns[29:35] - 1) / 3
    np.testing.assert_allclose(scaled[29:35], plain[29:35] * (between + (1 - between) / 8), rtol=1e-6)


# --------------------------------------------------------------------------------------- constants


@pytest.mark.parametrize(("name", "sft_lr"), [("r3rag_qwen2.5_7b", 7e-6), ("r3rag_llama3.1_8b", 1e-5)])
def test_constants_are_those_of_the_paper(name: str, sft_lr: float) -> None:
    config = recipe(name)
    sft, rl, rollout, retrieval = config.sft, config.rl, config.rollout, config.retrieval
    assert config.name == name and config.phases == ("index", "sft", "rl", "eval")
    assert (sft.lr, sft.warmup, sft.epochs, sft.row_length) == (sft_lr, 0.1, 3, 4096)
    assert (rl.lr, rl.critic.lr, rl.warmup, rl.clip, rl.critic.value_clip) == (5e-7, 9e-6, 0.03, 0.2, 0.2)
    assert (rl.gamma, rl.critic.gae_lambda, rl.kl.coef, rl.epochs, rl.max_grad_norm) == (1, 1, 0.01, 1, 1)
    assert (rl.algorithm, rl.critic.kind, rl.step_discount, rl.negative_weight) == ("ppo", "separate", 0, 1)
    assert rl.loss_aggregation == "step"
    assert rl.questions == 64 and rl.iterations * rl.questions == 4 * 8192
    assert (rollout.protocol, rollout.max_steps, rollout.max_new_tokens) == ("steps", 5, 512)
    assert not rollout.truncates
    assert rollout.samples == 4 and rollout.temperatures == (0.1, 0.4, 0.7, 1.0)
    assert (retrieval.top_k, retrieval.max_passages, config.baselines.naive_rag.top_k) == (2, 10, 16)
    assert (retrieval.encoder.query_prefix, retrieval.encoder.passage_prefix) == ("query: ", "passage: ")
    assert (config.rewards.outcome_weight, config.rewards.factor_correct, config.rewards.factor_wrong) == (2, 1.6, 0.8)
    assert (config.rewards.compat, config.rewards.malformed) == ("paper", -0.9)
    assert (config.rewards.process, config.rewards.outcome) == ("judge", "judge")
    assert (config.model.dtype, config.model.remat) == ("bfloat16", "full")


@pytest.mark.parametrize(("name", "model"), RECIPES.items())
def test_lengths_fit_the_model_and_rows_fit_the_mesh(name: str, model: str) -> None:
    config, decoder = recipe(name), decoder_config(model)
    assert config.model.path == f"models/{model}"
    assert config.rollout.max_length == 4096 + config.rollout.max_new_tokens  # prompt limit and a step
    assert max(config.rollout.max_length, config.sft.row_length, config.rl.row_length) <= decoder.max_positions
    for rows in (config.sft.batch_rows, config.rl.batch_rows, config.rollout.slots):
        assert rows % config.mesh.fsdp == 0
    assert decoder.hidden_size % config.mesh.fsdp == 0


@pytest.mark.parametrize(("name", "topology", "budget"), SLOW_PODS)
def test_every_recipe_fits_its_pods_by_arithmetic(name: str, topology: str, budget: str) -> None:
    """Rows divide, and arrays with estimated temporaries fit; docs/pods.md has what the compiler says."""
    config, pod = recipe(name, budget), parse_topology(topology)
    decoder = decoder_config((RECIPES | {"r3rag_llama3.1_70b": "Llama-3.1-70B-Instruct"})[name])
    mesh = topology_mesh(devices_of(pod, compiles=False), mesh_sizes(config.mesh, pod.num_devices))
    phases = [phase for phase in config.phases if phase != "index"]
    check_rows(config, phases, mesh, mesh)
    planner = MemoryPlanner(Architecture(config, mesh, decoder))
    for phase in phases:
        [planned] = planner.plan(config, phase, mesh, mesh, jnp.bfloat16, pod.chip.memory)
        planned.check()
        assert not planned.is_tight, str(planned)
    # No array of weights or of the cache is whole on a device for want of a divisor.
    assert decoder.num_heads % config.mesh.tensor == decoder.num_kv_heads % config.mesh.tensor == 0
    assert decoder.hidden_size % config.mesh.fsdp == decoder.ffn_size % config.mesh.tensor == 0


def test_estimated_temporaries_are_near_what_was_compiled() -> None:
    """The SFT update of 7B for v5e:8x8, mesh.fsdp=64, 64 rows: 5.72 GB by libtpu 0.0.42.1."""
    config, pod = recipe("r3rag_qwen2.5_7b", "v5e-64"), parse_topology("v5e-64")
    mesh = topology_mesh(devices_of(pod, compiles=False), (1, 64, 1))
    planner = MemoryPlanner(Architecture(config, mesh, decoder_config("Qwen2.5-7B-Instruct")))
    [planned] = planner.plan(config, "sft", mesh, mesh, jnp.bfloat16, pod.chip.memory)
    assert planned.temporaries["sft"] == pytest.approx(5.72e9, rel=0.3)


@pytest.mark.parametrize("name", RECIPES)
def test_grpo_is_a_budget_beside_that_of_a_pod(name: str) -> None:
    paper, grpo, both = recipe(name), recipe(name, "grpo"), recipe(name, "grpo,v5e-64")
    assert (grpo.rl.algorithm, grpo.rl.kl.placement, grpo.rl.loss_aggregation) == ("grpo", "loss", "sequence")
    assert grpo.rollout.samples == 8 and grpo.rollout.temperatures == (1.0,)
    assert (both.rl, both.mesh) == (grpo.rl.replace(batch_rows=both.rl.batch_rows), recipe(name, "v5e-64").mesh)
    assert paper.rl.preset == "ppo_paper" and paper.mesh == grpo.mesh


def test_the_large_recipe_is_grpo_with_a_judge() -> None:
    config, decoder = recipe("r3rag_llama3.1_70b"), decoder_config("Llama-3.1-70B-Instruct")
    assert (config.rl.preset, config.rl.algorithm, config.rewards.process) == ("grpo", "grpo", "judge")
    assert config.mesh.fsdp * config.mesh.tensor == 64
    assert sum(map(math.prod, param_shapes(decoder).values())) == 70_553_706_496


# ------------------------------------------------------------------------------------------ traces


def new_decoder(config: Config, decoder: DecoderConfig) -> Decoder:
    return Decoder(decoder, rngs=nnx.Rngs(0), dtype=jnp.dtype(config.model.dtype))


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def state_of(params: Any, tx: Any) -> TrainState:
    return jax.eval_shape(lambda p: TrainState(jnp.zeros((), jnp.int32), p, tx.init(p)), params)


def batch_of(rows: int, length: int) -> Any:
    batch, _ = pack([], row_length=length, num_rows=rows)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
@pytest.mark.parametrize(("name", "model"), TRACED)
def test_every_update_traces_at_full_size(name: str, model: str) -> None:
    """SFT update, an iteration's targets and PPO update on the recipe's mesh: shapes alone, nothing is allocated."""
    config, decoder = recipe(name), decoder_config(model)
    mesh = make_mesh(config.mesh)
    new = functools.partial(new_decoder, config, decoder)
    graphdef, policy = nnx.split(nnx.eval_shape(new))
    critic = nnx.split(nnx.eval_shape(lambda: new_critic(new(), config.rl.critic.kind)))

    tx = optimizer.sft_optimizer(config.sft, 1000)
    state, rows = state_of(policy, tx), batch_of(config.sft.batch_rows, config.sft.row_length)
    batch = SFTBatch(rows.tokens, rows.positions, rows.segment_ids, None, rows.loss_mask)
    step = make_sft_step(mesh, graphdef, tx, config.model, state)
    after, metrics = jax.eval_shape(step, state, batch)
    assert shapes(after) == shapes(state) and metrics["loss"].shape == ()

    graphdefs, params = {"policy": graphdef, "critic": critic[0]}, {"policy": policy, "critic": critic[1]}
    num_params = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    assert num_params == 2 * sum(map(math.prod, param_shapes(decoder).values())) + decoder.hidden_size
    tx = optimizer.rl_optimizer(config.rl)
    state, batch = state_of(params, tx), batch_of(config.rl.batch_rows, config.rl.row_length)
    pre_update = make_pre_update(mesh, graphdefs, graphdefs["policy"], config.model, config.rl)
    found, _ = jax.eval_shape(pre_update, params, policy, batch)
    for x in (found.values, found.penalties):
        assert x.shape == (config.rl.batch_rows, config.rl.row_length)
    targets = Targets(found.values, found.values, found.values, shares=found.values)
    step = make_rl_step(mesh, graphdefs, tx, config.model, config.rl, state)
    after, metrics = jax.eval_shape(step, state, batch, targets, jax.ShapeDtypeStruct((), jnp.float32))
    assert shapes(after) == shapes(state) and metrics["value_loss"].shape == ()


@pytest.mark.parametrize(("name", "model"), RECIPES.items())
def test_prefill_and_decode_trace_at_full_size(name: str, model: str) -> None:
    config, decoder = recipe(name), decoder_config(model)
    slots, length = config.rollout.slots, config.rollout.max_length
    for devices in (1, 4):
        mesh = MeshConfig(sampler_devices=devices)
        programs = SamplerPrograms(
            decoder, make_sampler_mesh(mesh, make_mesh(mesh)), slots=slots, max_length=length,
            decode_chunk=config.rollout.decode_chunk, dtype=jnp.bfloat16,
        )  # fmt: skip
        policy = programs.abstract_decoder(jnp.bfloat16)
        prefill = programs.prefill_program(policy, slots // devices, ACCELERATOR_SHAPES.lengths[-1])
        prefilled = jax.eval_shape(prefill.function, *prefill.args)
        assert shapes(prefilled) == shapes(programs.cache)
        for window in programs.windows if devices == 1 else ():
            decode = programs.decode_program(policy, window)
            decoded = jax.eval_shape(functools.partial(decode.function, **decode.static), *decode.args)
            assert shapes(decoded.cache) == shapes(programs.cache)
            assert decoded.rows.tokens.shape == (window.rows, config.rollout.decode_chunk)


@pytest.mark.parametrize("overrides", [[], ["budget=cpu"]])
def test_the_smollm2_recipe_loads_in_both_sizes(overrides: list[str]) -> None:
    config = load_config(TESTS.parent / "configs" / "wikihop_smollm2.yaml", overrides)
    assert (config.lora.rank > 0) == bool(overrides)
    built = Path(config.coldstart.dir) / TRAJECTORIES
    assert (config.data.path("sft") == built) == bool(overrides)  # on a CPU, what the cold start builder has written

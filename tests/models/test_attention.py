"""Every attention implementation against "xla": interpreted here, on its hardware, and compiled for a pod."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import AxisType, Mesh

from r3rag_jax.config import KLConfig, MeshConfig, ModelConfig, RLConfig, SFTConfig
from r3rag_jax.errors import UserError
from r3rag_jax.models.attention import attention
from r3rag_jax.models.block_attention import seen_blocks
from r3rag_jax.models.decoder import PARAM_AXES, Decoder
from r3rag_jax.models.visibility import Tokens
from r3rag_jax.parallel.mesh import AXES, make_mesh
from r3rag_jax.parallel.shardings import batch_shardings, device_put_batch, device_put_global, tree_shardings
from r3rag_jax.parallel.target import Target
from r3rag_jax.training import optimizer
from r3rag_jax.training.losses import sft_loss
from r3rag_jax.training.micro_batches import BatchShare, value_and_grad
from r3rag_jax.training.state import TrainState
from r3rag_jax.training.steps import make_sft_step
from r3rag_jax.training.targets import make_pre_update
from r3rag_jax.types import SFTBatch, TrainBatch

BOUNDS = {jnp.float32: 2e-6, jnp.bfloat16: 1e-2}  # as the docstring of `attention` states them


def segments_of(*lengths: int) -> jax.Array:
    """[1, L]: segments 1, 2, … of these lengths; the last is padding."""
    return jnp.repeat(jnp.append(jnp.arange(1, len(lengths)), 0), np.array(lengths))[None]


def output_and_gradients(
    implementation: str, shape: tuple[int, ...], dtype: Any, segments: jax.Array | None
) -> dict[str, np.ndarray]:
    B, L, N, K, H = shape
    normal = [tiny.normal(seed, B, L, heads, H, dtype=dtype) for seed, heads in enumerate((N, K, K, N))]

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments, implementation=implementation), q, k, v)
        return out, *pull(grad)

    arrays = run(*normal)
    assert all(array.dtype == dtype for array in arrays)
    return {name: np.asarray(x, np.float32) for name, x in zip(("out", "q", "k", "v"), arrays, strict=True)}


def assert_same_numbers(implementation: str, shape: tuple[int, ...], dtype: Any, segments: jax.Array | None) -> None:
    """Output and gradients: the norm of the difference, relative to the norm of xla's. Rows that are padding too."""
    got, want = (output_and_gradients(name, shape, dtype, segments) for name in (implementation, "xla"))
    for name in want:
        assert np.isfinite(got[name]).all(), name
        assert np.linalg.norm(got[name] - want[name]) <= BOUNDS[dtype] * np.linalg.norm(want[name]), name


@pytest.mark.parametrize(
    ("shape", "dtype", "segments"),
    [
        pytest.param((1, 100, 2, 1, 128), jnp.float32, None, marks=pytest.mark.slow),
        ((1, 600, 4, 2, 8), jnp.float32, segments_of(500, 61, 39)),  # two blocks, of 384; a segment in both
        ((2, 130, 4, 2, 128), jnp.bfloat16, segments_of(70, 40, 20).repeat(2, 0)),  # 128**-0.5: not exact in bfloat16
    ],
)
def test_splash_gives_the_numbers_of_xla(shape: tuple[int, ...], dtype: Any, segments: jax.Array | None) -> None:
    assert_same_numbers("splash", shape, dtype, segments)


@pytest.mark.parametrize(
    ("shape", "dtype", "segments"),
    [
        ((1, 24, 4, 2, 8), jnp.float32, None),  # one block
        ((1, 300, 4, 2, 8), jnp.float32, segments_of(40, 200, 60)),  # three, of 100
        ((2, 130, 4, 1, 128), jnp.bfloat16, segments_of(70, 40, 20).repeat(2, 0)),
        ((2, 259, 2, 2, 8), jnp.float32, jnp.concatenate([segments_of(259, 0), segments_of(1, 129, 128, 1)])),
    ],
)
def test_blocks_give_the_numbers_of_xla(shape: tuple[int, ...], dtype: Any, segments: jax.Array | None) -> None:
    assert_same_numbers("blocks", shape, dtype, segments)


def test_only_blocks_that_a_query_sees_are_computed() -> None:
    """Blocks of two tokens: a trajectory of two, a tree (a prefix of one, branches of two and one), one of padding."""
    segment = jnp.repeat(jnp.array([1, 2, 0]), np.array([4, 8, 2]))
    branch = jnp.repeat(jnp.array([0, 1, 2, 0]), np.array([6, 4, 2, 2]))
    blocks, counts = seen_blocks(Tokens(*(x.reshape(1, 7, 2) for x in (jnp.arange(14), segment, branch))))
    seen = [set(blocks[0, i, : counts[0, i]].tolist()) for i in range(7)]
    assert seen == [{0}, {0, 1}, {2}, {2, 3}, {2, 3, 4}, {2, 5}, {6}]


@pytest.mark.parametrize(
    ("implementation", "backend"),
    [
        pytest.param("cudnn", "gpu", marks=pytest.mark.gpu),
        pytest.param("splash", "tpu", marks=pytest.mark.tpu),
    ],
)
def test_on_its_hardware_in_bfloat16(implementation: str, backend: str) -> None:
    if jax.default_backend() != backend:
        pytest.skip(f"needs a {backend}, and JAX_PLATFORMS to name it; got {jax.default_backend()}")
    for H in (64, 128):
        assert_same_numbers(implementation, (1, 1000, 8, 2, H), jnp.bfloat16, None)
        assert_same_numbers(implementation, (1, 1000, 8, 2, H), jnp.bfloat16, segments_of(500, 300, 200))


@pytest.mark.parametrize(
    ("implementation", "platform", "message"),
    [
        ("splash", "gpu", "'splash' must run on tpu or cpu; got gpu"),
        ("cudnn", "tpu", "'cudnn' must run on gpu; got tpu"),
    ],
)
def test_the_wrong_hardware_is_refused(implementation: str, platform: str, message: str) -> None:
    q = jnp.zeros((1, 2, 2, 8))
    with pytest.raises(UserError, match=message):
        attention(q, q, q, implementation=implementation, target=Target(platform))


# ----------------------------------------------------------------------------- the training steps, on a mesh


def batch() -> SFTBatch:
    tokens = tiny.integers(1, 4, 24, high=272)
    segments = jnp.tile(segments_of(10, 9, 5), (4, 1))
    positions = jnp.tile(jnp.concatenate([jnp.arange(n) for n in (10, 9, 5)]), (4, 1))
    return SFTBatch(tokens, positions, segments, None, segments > 0)


def policy(implementation: str) -> tuple[Any, Any]:
    """graphdef and params; a vocabulary and heads that the tensor axis cuts."""
    model = tiny.decoder(272)
    model.attention_implementation = implementation
    return nnx.split(model)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["splash", "blocks"])
def test_one_answer_on_a_mesh_under_scan_and_remat(implementation: str) -> None:
    def loss_and_gradients(mesh: Mesh, implementation: str) -> Any:
        graphdef, params = policy(implementation)

        def loss(params: Any, _: Any, batch: SFTBatch, share: BatchShare) -> Any:
            return sft_loss(graphdef, params, batch, "full", Target.of(mesh).shard(), share=share)

        params = device_put_global(params, tree_shardings(mesh, params, PARAM_AXES))
        gradients = jax.jit(lambda params, batch: value_and_grad(mesh, loss, params, None, (batch,)))
        return jax.device_get(gradients(params, device_put_batch(mesh, batch())))

    one = jax.make_mesh((1, 1, 1), AXES, devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 3)
    many = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    want, got = loss_and_gradients(one, "xla"), loss_and_gradients(many, implementation)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
def test_each_device_of_a_mesh_computes_its_own_rows_and_heads() -> None:
    # An interpreted kernel is split by the compiler, and works without the mesh; a compiled one is not.
    mesh, (graphdef, params), rows = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), policy("splash"), batch()
    tx = optimizer.sft_optimizer(SFTConfig(), 10)
    state = jax.eval_shape(lambda params: TrainState(jnp.int32(0), params, tx.init(params)), params)
    step = make_sft_step(mesh, graphdef, tx, ModelConfig(), state)
    zeros = {field.name: jnp.zeros((4, 24)) for field in dataclasses.fields(TrainBatch)}
    train_batch = TrainBatch(**zeros | {f.name: getattr(rows, f.name) for f in dataclasses.fields(SFTBatch)})
    pre_update = make_pre_update(
        mesh, {"policy": graphdef}, graphdef, ModelConfig(), RLConfig(algorithm="reinforce++", kl=KLConfig(coef=0.1))
    )
    for traced in (step.trace(state, rows), pre_update.trace({"policy": params}, params, train_batch)):
        jaxpr = str(traced.jaxpr)
        assert "shard_map" in jaxpr
        assert "name=splash_mha_fwd" in jaxpr
        assert "f32[1,24,2,8]" in jaxpr  # a row of the four, two of the four heads


# ----------------------------------------------------------------------------- a TPU pod without a pod


@pytest.mark.tpu
@pytest.mark.parametrize("sizes", [(1, 16, 1), (2, 4, 2)])
def test_an_sft_step_compiles_for_a_pod(pod: Any, sizes: tuple[int, int, int]) -> None:
    mesh = Mesh(np.array(pod).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)

    def place(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def new_decoder() -> Decoder:
        return Decoder(
            tiny.LLAMA_8B_OF_TWO_LAYERS, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, attention_implementation="splash"
        )

    graphdef, params = nnx.split(nnx.eval_shape(new_decoder))
    tx = optimizer.sft_optimizer(SFTConfig(), 100)
    state = jax.eval_shape(lambda p: TrainState(jnp.int32(0), p, tx.init(p)), params)
    ids = jax.ShapeDtypeStruct((16, 2048), jnp.int32)
    rows = SFTBatch(ids, ids, ids, None, jax.ShapeDtypeStruct(ids.shape, jnp.bool_))
    step = make_sft_step(mesh, graphdef, tx, ModelConfig(remat="full"), state)
    lowered = step.lower(
        place(state, tree_shardings(mesh, state, PARAM_AXES)), place(rows, batch_shardings(mesh, rows))
    )
    compiled = lowered.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert all(f"splash_mha_{kernel}_segmented" in text for kernel in ("fwd", "dq", "dkv"))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    split = 16 // sizes[0]
    assert memory.argument_size_in_bytes == pytest.approx(12 * num_params / split, rel=0.01)  # float32, two moments
    # A v5e chip has 16 GiB; "xla" takes 5 GiB more than "splash" beside the state.
    assert memory.temp_size_in_bytes < 4 * 2**30

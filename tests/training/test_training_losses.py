"""The losses: one answer on every mesh, gradients where they belong."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import Mesh
from tiny_training import (
    HEAD,
    MESHES,
    RL,
    VOCAB,
    assert_close,
    attempt,
    flat,
    grads_on,
    modules,
    on_one_device,
    one_device,
    rewards_of,
    rl_batch,
    rl_grads,
    samples,
    sft_batch,
    sft_grads,
    targets_like,
    targets_of,
)

from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import Decoder
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.parallel.target import ONE_CPU, Target
from r3rag_jax.training import state as state_module
from r3rag_jax.training.batch import pack
from r3rag_jax.training.losses import rl_loss, sft_loss
from r3rag_jax.training.micro_batches import value_and_grad
from r3rag_jax.training.state import shift_right
from r3rag_jax.types import SFTBatch

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
MESH_PARAMS = [pytest.param(sizes, marks=pytest.mark.slow if 1 in sizes else ()) for sizes in MESHES]


@pytest.mark.parametrize("sizes", MESH_PARAMS)
def test_sft_loss_and_gradients_on_a_mesh(sizes: tuple[int, int, int]) -> None:
    assert_close(sft_grads(make_mesh(tiny.mesh_config(*sizes)), sft_batch()), on_one_device("sft"))


@pytest.mark.parametrize("sizes", MESH_PARAMS)
def test_rl_loss_and_gradients_on_a_mesh(sizes: tuple[int, int, int]) -> None:
    assert_close(rl_grads(make_mesh(tiny.mesh_config(*sizes)), rl_batch()), on_one_device("rl"))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("model", [{}, {"model_type": "qwen3", "tie_word_embeddings": False}], ids=["qwen2", "qwen3"])
def test_fourteen_heads_of_two_groups_on_a_mesh(model: dict[str, Any], sizes: tuple[int, int, int]) -> None:
    """Over eight devices two query heads each, over four four: the last device has fewer, or none."""
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 4}
    config = DecoderConfig.from_hf(tiny.decoder_config(VOCAB) | heads | model)
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))

    def on(mesh: Mesh) -> Any:
        def loss(params: Any, _: Any, batch: SFTBatch, share: Any) -> Any:
            return sft_loss(graphdef, params, batch, "full", Target.of(mesh).shard(), share=share)

        return grads_on(
            mesh, jax.jit(lambda params, batch: value_and_grad(mesh, loss, params, None, (batch,))), params, sft_batch()
        )

    assert_close(on(make_mesh(tiny.mesh_config(*sizes))), on(one_device()))


def hidden_grads(monkeypatch: pytest.MonkeyPatch, loss: Callable[[Any], Any], shape: tuple[int, ...]) -> np.ndarray:
    """d loss / d (the hidden state that predicts token t), [B, L, D]."""
    previous = shift_right

    def from_delta(delta: jax.Array) -> jax.Array:
        with monkeypatch.context() as patch:
            patch.setattr(state_module, "shift_right", lambda hidden: previous(hidden) + delta)
            return loss(None)[0]

    return np.asarray(jax.jit(jax.grad(from_delta))(jnp.zeros(shape, jnp.float32)))


@pytest.mark.parametrize("phase", ["sft", "rl"])
def test_only_the_policys_tokens_are_trained(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphdefs, params = modules()
    batch = rl_batch()

    def loss(_: Any) -> Any:
        if phase == "sft":
            return sft_loss(graphdefs["policy"], params["policy"], sft_batch(), "none", ONE_CPU)
        return rl_loss(graphdefs, params, batch, targets_like(batch), RL, "none", ONE_CPU)

    grads_BL = np.abs(hidden_grads(monkeypatch, loss, (*batch.tokens.shape, 32))).max(axis=-1)
    assert (grads_BL[~batch.loss_mask] == 0).all()  # prompts, passages, padding: exactly
    assert (grads_BL[batch.loss_mask] > 0).all()


def test_what_stands_at_masked_tokens_changes_nothing() -> None:
    batch = rl_batch()
    targets, mask = targets_like(batch), batch.loss_mask
    spoil = functools.partial(jax.tree.map, lambda x: np.where(mask, x, np.nan).astype(np.float32))
    spoilt = dataclasses.replace(batch, behaviour_logprobs=spoil(batch.behaviour_logprobs))
    assert_close(rl_grads(one_device(), spoilt, spoil(targets)), on_one_device("rl"), rtol=0)


def test_a_batch_without_policy_tokens_trains_nothing() -> None:
    batch = rl_batch()
    empty = dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    for metrics, grads in (
        sft_grads(one_device(), SFTBatch(empty.tokens, empty.positions, empty.segment_ids, None, empty.loss_mask)),
        rl_grads(one_device(), empty),
    ):
        assert metrics["loss"] == 0
        assert (flat(grads) == 0).all()


def test_packed_rows_are_separate_rows() -> None:
    made = samples()
    packed = rl_batch(num_rows=len(made))  # the same shape: the last rows are empty
    each = [pack([sample], row_length=40)[0] for sample in made]
    separate = jax.tree.map(lambda *rows: np.concatenate(rows), *each)
    assert packed.tokens.shape == separate.tokens.shape
    assert packed.loss_mask.any(axis=1).sum() < separate.loss_mask.any(axis=1).sum() == len(made)
    mesh = one_device()
    sft_of = lambda b: SFTBatch(b.tokens, b.positions, b.segment_ids, None, b.loss_mask)  # noqa: E731
    assert_close(sft_grads(mesh, sft_of(packed)), sft_grads(mesh, sft_of(separate)))
    graphdefs, params = modules()
    results = []
    attempts, rewards = [attempt(sample) for sample in made], rewards_of(made)
    starts = pack(made, row_length=40)[1], 40 * np.arange(len(made))
    for batch, starts_of_batch in zip((packed, separate), starts, strict=True):
        work = [(batch, starts_of_batch)], attempts, rewards
        [targets], logs = targets_of(mesh, graphdefs, params, params["policy"], work, RL)
        results.append((jax.device_get(logs), rl_grads(mesh, batch, targets)))
    assert_close(*results)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_memory_and_not_gradients(remat: str) -> None:
    assert_close(sft_grads(one_device(), sft_batch(), remat), on_one_device("sft"))


@pytest.mark.parametrize(("critic", "is_shared"), [("head", True), ("separate", False)])
def test_the_value_loss_reaches_the_policy_only_through_a_shared_trunk(critic: str, is_shared: bool) -> None:
    with_value = rl_grads(one_device(), rl_batch(), critic=critic)[1]
    without = rl_grads(one_device(), rl_batch(), critic=critic, config=RL.replace(critic=HEAD.replace(value_coef=0.0)))[
        1
    ]
    assert np.array_equal(flat(with_value["policy"]), flat(without["policy"])) is not is_shared
    assert (flat(without["critic"]) == 0).all()
    assert np.abs(flat(with_value["critic"])).max() > 0

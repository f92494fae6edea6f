"""Adapters: the same function when merged, gradients of the definition, and nothing else trained."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_training
from flax import nnx
from jax.sharding import Mesh
from tiny_training import RL, VOCAB

from r3rag_jax.config import ConfigError, LoraConfig, MeshConfig, ModelConfig, SFTConfig
from r3rag_jax.models import lora
from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.parallel.shardings import device_put_batch, device_put_global, tree_shardings
from r3rag_jax.parallel.target import ONE_CPU, Target
from r3rag_jax.training import optimizer
from r3rag_jax.training.losses import rl_loss, sft_loss
from r3rag_jax.training.micro_batches import value_and_grad
from r3rag_jax.training.state import init_state, new_critic
from r3rag_jax.training.steps import make_sft_step
from r3rag_jax.training.targets import make_pre_update, make_targets

LORA = LoraConfig(rank=3, alpha=6.0)
TAGS = (5, 9)  # ids whose embeddings are trained too


def adapted(config: LoraConfig = LORA, *, filled: bool = True) -> tuple[Any, lora.TrainableSplit]:
    """A tiny decoder, and the same with adapters whose B is random where `filled`."""
    decoder = tiny.decoder(VOCAB)
    copy = nnx.merge(*nnx.split(decoder))
    parts = lora.split_trainable(lora.attach(copy, config, tiny_training.one_device(), seed=0, token_ids=TAGS), config)
    if filled:
        seeds = itertools.count()
        draw = lambda x: 0.05 * tiny.normal(next(seeds), *x.shape) if not x.any() else x  # noqa: E731
        parts = lora.TrainableSplit(parts.graphdef, jax.tree.map(draw, parts.params), parts.frozen)
    return decoder, parts


jitted_hidden = nnx.jit(lambda decoder, *arrays: decoder(*arrays))


def hidden(decoder: Any) -> jax.Array:
    batch = tiny_training.sft_batch()
    return jitted_hidden(decoder, batch.tokens, batch.positions, batch.segment_ids)


def names(state: Any) -> set[str]:
    return {str(path[-1]) for path, _ in nnx.to_flat_state(state)}


def test_new_adapters_change_nothing() -> None:
    decoder, parts = adapted(filled=False)
    np.testing.assert_array_equal(hidden(lora.join(parts.graphdef, parts.params, parts.frozen)), hidden(decoder))


def test_merged_weights_are_w_plus_scaled_a_b_and_compute_the_same() -> None:
    decoder, parts = adapted()
    module = lora.join(parts.graphdef, parts.params, parts.frozen)
    merged = nnx.merge(
        nnx.split(decoder)[0], jax.jit(lora.merge, static_argnums=0)(parts.graphdef, parts.params, parts.frozen)
    )
    a, b = (np.asarray(getattr(module.layers, f"down_proj_{side}")[...]) for side in "ab")
    np.testing.assert_allclose(
        merged.param("down_proj")[...], decoder.param("down_proj")[...] + 2.0 * a @ b, rtol=1e-6, atol=1e-7
    )
    assert np.abs(hidden(merged) - hidden(decoder)).max() > 0.1
    np.testing.assert_allclose(hidden(merged), hidden(module), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_definition() -> None:
    """With W' = W + s A B: dA = s dW' B^T and dB = s A^T dW', per layer."""
    decoder, parts = adapted(LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "up_proj")))
    batch = tiny_training.sft_batch()

    def loss_of(params: Any) -> jax.Array:
        return sft_loss(parts.graphdef, params, batch, "none", ONE_CPU, parts.frozen)[0]

    graphdef = nnx.split(decoder)[0]
    whole = lora.merge(parts.graphdef, parts.params, parts.frozen)
    of_weights = jax.grad(lambda p: sft_loss(graphdef, p, batch, "none", ONE_CPU)[0])(whole)["layers"]
    found, values = jax.grad(loss_of)(parts.params)["layers"], parts.params["layers"]
    for name in ("q_proj", "up_proj"):
        change = of_weights[name][...]
        a, b = values[f"{name}_a"][...], values[f"{name}_b"][...]
        want_a, want_b = 2.0 * change @ jnp.swapaxes(b, 1, 2), 2.0 * jnp.swapaxes(a, 1, 2) @ change
        np.testing.assert_allclose(found[f"{name}_a"][...], want_a, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found[f"{name}_b"][...], want_b, rtol=1e-3, atol=1e-6)


def test_only_adapters_are_in_the_state_and_a_step_moves_them() -> None:
    _, parts = adapted(filled=False)
    tx = optimizer.sft_optimizer(SFTConfig(lr=1e-2, warmup=0.0), 10)
    mesh = tiny_training.one_device()
    state = init_state(mesh, parts.params, tx)
    assert names(state.params) == {f"{name}_{side}" for name in LORA.targets for side in "ab"} | {"embed_rows"}
    assert names(parts.frozen) == {*names(nnx.split(tiny.decoder(VOCAB))[1])}
    step, losses = make_sft_step(mesh, parts.graphdef, tx, ModelConfig(), state), []
    for _ in range(5):
        state, metrics = step(state, tiny_training.sft_batch(), parts.frozen)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert all(np.asarray(x).any() for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("kind", ["separate", "head"])
def test_a_critic_trains_its_adapters_and_its_head_over_the_policys_weights(kind: str) -> None:
    _, parts = adapted(filled=False)
    critic = lora.split_trainable(new_critic(lora.join(parts.graphdef, parts.params, parts.frozen), kind), LORA)
    own = {f"{name}_{side}" for name in LORA.targets for side in "ab"} | {"embed_rows"} if kind == "separate" else set()
    assert names(critic.params) == own | {"head"}
    shared = {id(x) for x in jax.tree.leaves(parts.frozen)}
    assert all(id(x) in shared for x in jax.tree.leaves(critic.frozen))


@pytest.mark.slow
def test_on_a_mesh_targets_and_gradients_are_those_of_one_device() -> None:
    """RL, whose reference is the policy without adapters."""
    _, parts = adapted()
    plain = nnx.split(tiny.decoder(VOCAB))[0]
    critic = lora.split_trainable(new_critic(lora.join(parts.graphdef, parts.params, parts.frozen), "separate"), LORA)
    both = {"policy": parts, "critic": critic}
    graphdefs = {name: part.graphdef for name, part in both.items()}
    trees = {name: part.params for name, part in both.items()}, {name: part.frozen for name, part in both.items()}

    def on(mesh: Mesh) -> Any:
        params, frozen = (device_put_global(tree, tree_shardings(mesh, tree, PARAM_AXES)) for tree in trees)
        batch = device_put_batch(mesh, tiny_training.rl_batch())
        pre_update = make_pre_update(mesh, graphdefs, plain, ModelConfig(), RL)
        found, stats = pre_update(params, frozen["policy"], batch, frozen)
        targets_of = make_targets(mesh, RL, num_steps=3)
        table = tiny_training.table_of(tiny_training.rl_work())
        [targets], _ = targets_of([found], table, RL.kl.coef, batch.tokens.shape)

        def loss(params: Any, frozen: Any, batch: Any, targets: Any, share: Any) -> Any:
            target = Target.of(mesh).shard()
            return rl_loss(graphdefs, params, batch, targets, RL, "none", target, frozen=frozen, share=share)

        gradients = jax.jit(functools.partial(value_and_grad, mesh, loss))
        return jax.device_get((targets, stats, gradients(params, frozen, (batch, targets))))

    wanted, found = on(tiny_training.one_device()), on(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert wanted[1]["kl"] != 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), wanted, found)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": -1}, "lora.rank must be at least 0; got -1"),
        ({"alpha": 0.0}, "lora.alpha must be above 0; got 0.0"),
        ({"targets": ("q_proj", "wq")}, "lora.targets must be among q_proj, .*; got 'wq'"),
        ({"targets": ()}, "lora.targets must name at least one"),
    ],
)
def test_a_wrong_setting_is_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**keys)

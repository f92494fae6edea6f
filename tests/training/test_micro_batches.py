"""Micro-batches: their losses and gradients add up to the batch's, and there are as few as the limit allows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from tiny_training import RL, assert_close, modules, one_device, rl_batch, sft_batch, targets_like

from r3rag_jax.config import KLConfig
from r3rag_jax.errors import UserError
from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.parallel.shardings import batch_ways, device_put_batch, device_put_global, tree_shardings
from r3rag_jax.parallel.target import Target
from r3rag_jax.training.losses import rl_loss, sft_loss
from r3rag_jax.training.micro_batches import BatchShare, check_rows, num_micro_batches, value_and_grad
from r3rag_jax.training.state import Targets
from r3rag_jax.types import SFTBatch, TrainBatch

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        *((kind, (1, 1, 1)) for kind in ("sft", "step")),
        *(pytest.param(kind, (1, 1, 1), marks=pytest.mark.slow) for kind in ("token", "constant")),
        ("step", (2, 2, 2)),
        *(pytest.param(kind, (2, 2, 2), marks=pytest.mark.slow) for kind in ("sft", "token", "constant")),
    ],
)
def test_micro_batches_add_up_to_the_batch(kind: str, sizes: tuple[int, int, int]) -> None:
    """Loss, metrics and gradients of micro-batches that hold unequal numbers of tokens, trajectories and gains."""
    mesh = one_device() if sizes == (1, 1, 1) else make_mesh(tiny.mesh_config(*sizes))
    target, (graphdefs, params) = Target.of(mesh).shard(), modules()
    params = device_put_global(params, tree_shardings(mesh, params, PARAM_AXES))
    if kind == "sft":

        def loss(params: Any, _: Any, batch: SFTBatch, share: BatchShare) -> Any:
            return sft_loss(graphdefs["policy"], params, batch, "none", target, share=share)

        params, batch = params["policy"], (sft_batch(),)
    else:
        rng, config = (
            np.random.default_rng(3),
            RL.replace(loss_aggregation=kind, kl=KLConfig(coef=0.05, placement="loss", estimator="k3")),
        )
        targets = targets_like(rl_batch())
        drawn = {
            name: rng.uniform(0.1, 1.0, targets.returns.shape).astype(np.float32) for name in ("shares", "weights")
        }
        targets = dataclasses.replace(
            targets, ref_logprobs=-8 * drawn["weights"], old_logprobs=-7 * drawn["shares"], **drawn
        )

        def loss(params: Any, _: Any, batch: TrainBatch, targets: Targets, share: BatchShare) -> Any:
            return rl_loss(graphdefs, params, batch, targets, config, "none", target, share=share)

        batch = (rl_batch(), targets)

    def gradients(micro_tokens: int) -> Any:
        compute = jax.jit(lambda params, batch: value_and_grad(mesh, loss, params, None, batch, micro_tokens))
        return jax.device_get(compute(params, device_put_batch(mesh, batch)))

    ways = batch_ways(mesh, 8)  # rows of 40 tokens, 8 of them over 1 or 4 devices
    assert [num_micro_batches(8 // ways, 40, limit) for limit in (0, 40)] == [1, 8 if mesh.size == 1 else 2]
    assert_close(gradients(40), gradients(0))


@pytest.mark.parametrize(
    ("micro_tokens", "expected"), [(0, 1), (1, 6), (79, 6), (80, 3), (119, 3), (120, 2), (10**6, 1)]
)
def test_micro_batches_are_as_few_as_the_limit_allows(micro_tokens: int, expected: int) -> None:
    assert num_micro_batches(6, 40, micro_tokens) == expected


def test_rows_that_do_not_divide_are_refused() -> None:
    batch = jax.tree.map(lambda x: x[:6], sft_batch())
    mesh = make_mesh(tiny.mesh_config(2, 2, 2))
    with pytest.raises(UserError, match=r"batch_rows must be divisible by .* = 4 \(next: 4 or 8\); got 6"):
        value_and_grad(mesh, lambda *_: None, {}, None, (batch,))
    with pytest.raises(UserError, match=r"= 4 \(next: 4\); got 3"):
        check_rows(mesh, 3)

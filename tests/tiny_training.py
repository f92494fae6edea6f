"""What tests of training share: batches, targets and a tiny policy with a critic, and their gradients on a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import AxisType, Mesh

from r3rag_jax.config import CriticConfig, KLConfig, ModelConfig, RLConfig
from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.parallel import blocks
from r3rag_jax.parallel.mesh import AXES
from r3rag_jax.parallel.shardings import device_put_batch, device_put_global, tree_shardings
from r3rag_jax.parallel.target import Target
from r3rag_jax.training.batch import pack, tabulate
from r3rag_jax.training.losses import rl_loss, sft_loss
from r3rag_jax.training.micro_batches import BatchShare, value_and_grad
from r3rag_jax.training.state import Targets, new_critic
from r3rag_jax.training.targets import make_pre_update, make_targets
from r3rag_jax.types import Question, Sample, SFTBatch, Status, Step, TrainBatch, Trajectory, TrajectoryTable

VOCAB = 272  # divides by the tensor axis, so that the embedding is really cut

MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4))


HEAD = CriticConfig(kind="head", lr=1e-3, gae_lambda=0.9)


RL = RLConfig(lr=1e-3, critic=HEAD, kl=KLConfig(coef=0.05), entropy_coef=0.01, warmup=0.0)


# Batches with the index of each sample's first token, trajectories in the order of their samples, their rewards.
Work = tuple[list[tuple[TrainBatch, np.ndarray]], list[Trajectory], list[np.ndarray]]


def one_device() -> Mesh:
    return jax.make_mesh((1, 1, 1), AXES, devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 3)


def samples(count: int = 14) -> list[Sample]:
    """Trajectories of one to three steps: prompt, then written spans with passages in between."""
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        step_ids = [-1] * int(rng.integers(2, 6))
        for step in range(int(rng.integers(1, 4))):
            step_ids += [-1] * int(rng.integers(0, 4)) * (step > 0) + [step] * int(rng.integers(2, 6))
        ids, steps = rng.integers(0, VOCAB, len(step_ids)).astype(np.int32), np.asarray(step_ids, np.int32)
        logprobs = np.where(steps >= 0, -rng.uniform(1, 8, len(steps)), 0).astype(np.float32)
        made.append(Sample(ids, steps >= 0, logprobs, steps, float(rng.choice([0.0, 0.7, 1.0]))))
    return made


def rewards_of(made: list[Sample]) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.uniform(-1, 2, sample.step_ids.max() + 1).astype(np.float32) for sample in made]


def attempt(*samples: Sample, name: str = "q") -> Trajectory:
    """A trajectory of these samples; every step of it is answered."""
    num_steps = 1 + max(int(sample.step_ids.max(initial=-1)) for sample in samples)
    return Trajectory(Question(name, "?", ("b",)), (Step("a", answer="b"),) * num_steps, Status.ANSWERED, samples)


def rl_batch(row_length: int = 40, num_rows: int | None = 8) -> TrainBatch:
    return pack(samples(), row_length=row_length, num_rows=num_rows)[0]


def rl_work() -> Work:
    """What `targets_of` takes for `rl_batch()`."""
    made = samples()
    return [pack(made, row_length=40, num_rows=8)], [attempt(sample) for sample in made], rewards_of(made)


def sft_batch(**options: Any) -> SFTBatch:
    batch = rl_batch(**options)
    return SFTBatch(batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids, batch.loss_mask)


def targets_like(batch: TrainBatch) -> Targets:
    rng = np.random.default_rng(2)
    return Targets(*(rng.normal(size=batch.tokens.shape).astype(np.float32) for _ in range(3)))


def table_of(work: Work) -> TrajectoryTable:
    """The table of trajectories, each of a question of its own."""
    packed, attempts, rewards = work
    size = packed[0][0].tokens.size
    starts = np.concatenate([number * size + starts for number, (_, starts) in enumerate(packed)])
    return tabulate(attempts, rewards, starts, np.arange(len(attempts)), num_tokens=len(packed) * size)


def targets_of(
    mesh: Mesh, graphdefs: dict[str, Any], params: Any, reference: Any, work: Work, config: RLConfig
) -> tuple[list[Targets], list[dict[str, Any]]]:
    """What an iteration makes of host batches: (targets, metrics of the forward passes and of the targets)."""
    batches = [batch for batch, _ in work[0]]
    pre_update = make_pre_update(mesh, graphdefs, graphdefs["policy"], ModelConfig(), config)
    found = [pre_update(params, reference, device_put_batch(mesh, batch)) for batch in batches]
    estimate = make_targets(mesh, config, num_steps=3)
    shape = batches[0].tokens.shape
    targets, stats = estimate([one for one, _ in found], table_of(work), config.kl.coef, shape)
    return targets, [metrics for _, metrics in found] + [stats]


@functools.cache
def modules(critic: str = "head") -> tuple[dict[str, Any], dict[str, Any]]:
    """(graphdefs, params) of a policy and a critic whose head is not zero."""
    policy = tiny.decoder(VOCAB)
    value_model = new_critic(policy, critic)
    value_model.head[...] = 0.1 * jax.random.normal(jax.random.key(5), value_model.head.shape)
    split = {"policy": nnx.split(policy), "critic": nnx.split(value_model)}
    return {name: graphdef for name, (graphdef, _) in split.items()}, {name: p for name, (_, p) in split.items()}


Gradients = Callable[[Any, Any], tuple[tuple[Any, dict[str, Any]], Any]]


@functools.cache  # of every jitted function there is one, which is traced once for a shape and a mesh
def sft_gradients(remat: str, mesh: Mesh) -> Gradients:
    def loss(params: Any, _: Any, batch: SFTBatch, share: BatchShare) -> Any:
        return sft_loss(modules()[0]["policy"], params, batch, remat, Target.of(mesh).shard(), share=share)

    return jax.jit(lambda params, batch: value_and_grad(mesh, loss, params, None, (batch,)))


@functools.cache
def rl_gradients(critic: str, config: RLConfig, mesh: Mesh) -> Gradients:
    def loss(params: Any, _: Any, batch: TrainBatch, targets: Targets, share: BatchShare) -> Any:
        target = Target.of(mesh).shard()
        return rl_loss(modules(critic)[0], params, batch, targets, config, "none", target, share=share)

    return jax.jit(lambda params, both: value_and_grad(mesh, loss, params, None, both))


def sft_grads(mesh: Mesh, batch: SFTBatch, remat: str = "none") -> tuple[dict[str, Any], Any]:
    """(metrics, gradients) of the SFT loss, on the host."""
    return grads_on(mesh, sft_gradients(remat, mesh), modules()[1]["policy"], batch)


def rl_grads(mesh: Mesh, batch: TrainBatch, targets: Targets | None = None, critic: str = "head",
             config: RLConfig = RL) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """(metrics, gradients) of the RL loss, on the host."""
    targets = targets_like(batch) if targets is None else targets
    return grads_on(mesh, rl_gradients(critic, config, mesh), modules(critic)[1], (batch, targets))


def grads_on(mesh: Mesh, gradients: Gradients, params: Any, batch: Any) -> tuple[dict[str, Any], Any]:
    """On a mesh with the output matrix, of 272 x 32, in three blocks, the last of which is short."""
    params = device_put_global(params, tree_shardings(mesh, params, PARAM_AXES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "MAX_ELEMENTS", 3000)
        (_, metrics), grads = gradients(params, device_put_batch(mesh, batch))
    return jax.device_get((metrics, grads))


@functools.cache
def on_one_device(phase: str) -> tuple[dict[str, Any], Any]:
    """What one device makes of the usual batch."""
    return sft_grads(one_device(), sft_batch()) if phase == "sft" else rl_grads(one_device(), rl_batch())


def assert_close(got: Any, want: Any, rtol: float = 1e-5) -> None:
    """Every leaf within rtol of the largest size of its counterpart."""

    def one(path: Any, a: Any, b: Any) -> None:
        a, b = np.asarray(a), np.asarray(b)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= rtol * np.abs(b).max(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(one, got, want)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))])


def two_steps() -> tuple[Sample, np.ndarray]:
    step_ids = np.asarray([-1, 0, 0, -1, 1, 1], np.int32)
    logprobs = np.where(step_ids >= 0, -2.0, 0).astype(np.float32)
    return Sample(np.arange(6, dtype=np.int32), step_ids >= 0, logprobs, step_ids), np.asarray([0.5, 2.0], np.float32)


def two_steps_work() -> Work:
    sample, rewards = two_steps()
    return [pack([sample], row_length=6)], [attempt(sample)], [rewards]


def per_step_work() -> Work:
    """The same trajectory, a sample and a batch for each step."""
    sample, rewards = two_steps()
    made = per_step(sample)
    return [pack([one], row_length=6) for one in made], [attempt(*made)], [rewards]


def per_step(sample: Sample) -> list[Sample]:
    """The same trajectory in the protocol `steps`."""
    first = Sample(sample.ids[:3], sample.loss_mask[:3], sample.behaviour_logprobs[:3], sample.step_ids[:3])
    later = np.where(sample.step_ids == 1, 1, -1).astype(np.int32)
    return [first, Sample(sample.ids, later == 1, np.where(later == 1, -2.0, 0).astype(np.float32), later)]

"""The updates of one RL iteration: forward passes, advantages, then one or more epochs over its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from r3rag_jax.config import Config
from r3rag_jax.models.lora import TrainableSplit
from r3rag_jax.parallel.shardings import device_put_batch, replicated
from r3rag_jax.run.watchdog import moved
from r3rag_jax.sampler.distribution import Truncation
from r3rag_jax.training import optimizer
from r3rag_jax.training.batch import IterationBatches
from r3rag_jax.training.guards import is_finite
from r3rag_jax.training.state import RLProgress, Targets, TrainState
from r3rag_jax.training.steps import make_rl_step
from r3rag_jax.training.targets import make_pre_update, make_targets
from r3rag_jax.types import TrainBatch

OnBadStep = Callable[[int, str, "StepInputs", Mapping[str, Any]], bool]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What an update takes beside the state."""

    batch: TrainBatch
    targets: Targets
    lr_scale: Any
    kl: Any  # weight of the KL


@dataclasses.dataclass(frozen=True)
class IterationTargets:
    """An iteration's batches with what they are trained towards, on the mesh."""

    batches: list[TrainBatch]
    targets: list[Targets]
    order: list[int]  # for each update the number of its batch
    logs: list[Mapping[str, Any]]  # metrics of the forward passes over each batch, and last of the advantages
    metrics: dict[str, float]  # of the packing
    # advantages, entropies where they are recorded: float32, of all tokens of the batches, one batch after the other
    recorded: dict[str, np.ndarray]


class RLUpdate:
    """The jitted programs of an iteration, for modules "policy" and perhaps "critic" on a mesh."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        modules: Mapping[str, TrainableSplit],
        reference: Any,
        ref_params: Any,
        tx: optax.GradientTransformationExtraArgs,
        state: TrainState,
    ):
        """Args:
        modules: structure and frozen parameters; the trained ones are in the state.
        reference, ref_params: graphdef and parameters of the reference policy.
        state: of the shapes and shardings that all states will have.
        """
        self._config, self._mesh, self._ref_params = config, mesh, ref_params
        graphdefs = {name: module.graphdef for name, module in modules.items()}
        self._frozen = {name: module.frozen for name, module in modules.items()}
        truncation = Truncation.of(config.rollout)
        self._pre_update = make_pre_update(
            mesh, graphdefs, reference, config.model, config.rl, truncation, records_entropy=config.log.entropy
        )
        self._replicate = jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))
        self._targets = make_targets(mesh, config.rl, num_steps=config.rollout.max_steps)
        self._step = make_rl_step(mesh, graphdefs, tx, config.model, config.rl, state, truncation)

    def targets(self, progress: RLProgress, packed: IterationBatches) -> IterationTargets:
        """Values, log-probabilities and advantages of an iteration's batches, before its first update."""
        batches: list[TrainBatch] = [device_put_batch(self._mesh, batch) for batch in packed.batches]
        params = progress.state.params
        found = [self._pre_update(params, self._ref_params, batch, self._frozen) for batch in batches]
        shape = (self._config.rl.batch_rows, self._config.rl.row_length)
        targets, stats = self._targets([of_batch for of_batch, _ in found], packed.table, progress.kl, shape)
        return IterationTargets(
            batches, targets, packed.order, [*(metrics for _, metrics in found), stats], packed.metrics,
            self._recorded(targets, [of_batch.entropy for of_batch, _ in found]),
        )  # fmt: skip

    def _recorded(self, targets: list[Targets], entropies: list[Any]) -> dict[str, np.ndarray]:
        """What the log of trajectories shows of each token."""
        if self._config.log.trajectories == 0 or not targets:
            return {}
        arrays = {"advantages": [of_batch.advantages for of_batch in targets]}
        arrays |= {"entropies": entropies} if self._config.log.entropy else {}
        found = jax.device_get(self._replicate(arrays))
        return {name: np.stack(of_batches).ravel() for name, of_batches in found.items()}

    def run(self, progress: RLProgress, iteration: IterationTargets, on_bad_step: OnBadStep) -> dict[str, float]:
        """Do all updates of an iteration; `progress` has the new state afterwards.

        Args:
            on_bad_step: called with (number of the update, its description, its inputs, its metrics) after an update
                whose loss or gradient was not finite, and which changed nothing; returns whether to go on.

        Returns:
            Each metric's mean over the updates that report it, the metrics of the packing, and `bad_steps`, their
            number, where there were any.
        """
        config = self._config.rl
        *pre_update_logs, stats = iteration.logs
        logs, num_bad = pre_update_logs, 0
        for number, i in enumerate(iteration.order):
            done = (number + 1) / len(iteration.order)
            lr_scale = optimizer.schedule((progress.iteration + done) / config.iterations, config.warmup, 0.1)
            inputs = StepInputs(iteration.batches[i], iteration.targets[i], lr_scale, np.float32(progress.kl))
            metrics = self.step(progress, inputs)
            moved(f"RL iteration {progress.iteration}: update {number + 1} of {len(iteration.order)}")
            if not is_finite(metrics):
                num_bad += 1
                if not on_bad_step(
                    number, f"update {number + 1} of {len(iteration.order)} (batch {i})", inputs, metrics
                ):
                    break
                continue
            sampler_gap = metrics.pop("sampler_gap")
            logs.append(metrics | ({} if number else {"sampler_gap": sampler_gap}))  # later the policy has moved
        metrics = mean_metrics([*jax.device_get(logs), jax.device_get(stats)]) | iteration.metrics
        return metrics | {"bad_steps": float(num_bad)} if num_bad else metrics

    def step(self, progress: RLProgress, inputs: StepInputs) -> dict[str, Any]:
        """Do one update; `progress` has the new state afterwards. Returns its metrics, on the host."""
        progress.state, metrics = self._step(
            progress.state, inputs.batch, inputs.targets, inputs.lr_scale, self._frozen, inputs.kl
        )
        return jax.device_get(metrics)


def mean_metrics(logs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each metric's mean over the logs that have it."""
    values: dict[str, list[float]] = {}
    for metrics in logs:
        for name, value in metrics.items():
            values.setdefault(name, []).append(float(value))
    return {name: float(np.mean(v)) for name, v in values.items()}

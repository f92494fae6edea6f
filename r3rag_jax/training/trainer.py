"""The trainer of the RL phase: what it holds between iterations, and one iteration's updates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.markup import escape

from r3rag_jax.components import Components
from r3rag_jax.errors import UserError
from r3rag_jax.models import lora
from r3rag_jax.parallel.shardings import device_put_batch, replicated
from r3rag_jax.rewards.scorer import Scores
from r3rag_jax.rl.algorithms import ALGORITHMS
from r3rag_jax.rl.losses import adapted_kl
from r3rag_jax.run.checkpoints import Checkpoints, load_arrays, save_arrays
from r3rag_jax.sampler.distribution import Truncation
from r3rag_jax.training import optimizer
from r3rag_jax.training.batch import fill_fraction, minibatches, pack_trajectories, tabulate
from r3rag_jax.training.guards import Guards, is_finite
from r3rag_jax.training.prefix_tree import share_prefixes
from r3rag_jax.training.state import Targets, init_state, new_critic
from r3rag_jax.training.steps import make_rl_step
from r3rag_jax.training.targets import make_pre_update, make_targets
from r3rag_jax.types import TrainBatch, Trajectory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What an update takes beside the state."""

    batch: TrainBatch
    targets: Targets
    lr_scale: Any
    kl: Any  # weight


class RLTrainer:
    """What RL holds: policy, critic, frozen reference, optimizer, weight of the KL; resumes by itself."""

    def __init__(self, components: Components):
        self._components, self._config = components, components.config.rl
        policy, cold_start = components.policy, components.policy_dir("sft")
        self._ref_params = policy.load(cold_start) if cold_start.exists() else policy.base_params()
        parts = self._parts()
        graphdefs = {name: part.graphdef for name, part in parts.items()}
        self._frozen = {name: part.frozen for name, part in parts.items()}
        self._merge = jax.jit(functools.partial(lora.merge, parts["policy"].graphdef))
        self._tx = tx = optimizer.rl_optimizer(self._config, components.config.model.moment_dtype)
        self.state: Any = init_state(components.mesh, {name: part.params for name, part in parts.items()}, tx)
        self.iteration, self.kl = 0, self._config.kl.coef
        self.guards = Guards(components.config.guards, self._config)
        self._kept_bad_step = False
        self.checkpoints = Checkpoints(components.run.checkpoints("rl"))
        if self.checkpoints.latest is not None:
            self.state, note = self.checkpoints.restore(self.state)
            self.iteration, self.kl = note["iteration"], note["kl"]
            self.guards.set_state(note["guards"])
        components.log.rewind("rl", self.iteration)
        model, truncation = components.config.model, Truncation.of(components.config.rollout)
        self._score = make_pre_update(components.mesh, graphdefs, policy.graphdef, model, self._config, truncation)
        num_steps = components.config.rollout.max_steps
        self._estimate = make_targets(components.mesh, self._config, num_steps=num_steps)
        self._step = make_rl_step(components.mesh, graphdefs, tx, model, self._config, self.state, truncation)

    @property
    def policy_params(self) -> Any:
        """What rollouts and export take: today's policy, its adapters merged."""
        trained, frozen = self.state.params["policy"], self._frozen["policy"]
        return trained if frozen is None else self._merge(trained, frozen)

    def _parts(self) -> dict[str, lora.TrainableSplit]:
        """Policy and critic as they are before RL."""
        parts = {"policy": self._components.policy.trainable(self._ref_params)}
        if ALGORITHMS[self._config.algorithm].needs_critic:
            policy = parts["policy"]
            decoder = lora.join(policy.graphdef, policy.params, policy.frozen)
            critic = new_critic(decoder, self._config.critic.kind)
            parts["critic"] = lora.split_trainable(critic, self._components.config.lora)
        return parts

    def save(self) -> None:
        """Make a checkpoint of the state, unless it may have to be rolled back."""
        if self.guards.is_clean or self._components.config.guards.action != "rollback":
            note = {"iteration": self.iteration, "kl": self.kl, "guards": self.guards.get_state()}
            self.checkpoints.save(self.iteration, self.state, note)

    def guard(self, metrics: Mapping[str, float]) -> None:
        """Say what is wrong with the iteration just done, and do as `guards.action` says.

        Raises:
            UserError: RL ends here.
        """
        broken, action = self.guards.check(metrics), self._components.config.guards.action
        if not broken:
            return
        told = f"RL iteration {self.iteration - 1}: {'; '.join(broken)}"
        if action == "stop":
            raise UserError(told)
        if action == "rollback":
            self._roll_back(told)
        else:
            self._components.console.print(f"[yellow]{escape(told)}[/]", highlight=False)

    def _roll_back(self, why: str) -> None:
        """State and weight of the KL of the last checkpoint, or of the start; questions go on where they are.

        Only other questions can go another way: the same ones would be played and learnt from alike.
        """
        most = self._components.config.guards.rollbacks
        if self.guards.rollbacks >= most:
            raise UserError(f"{why}; rolled back {most} times before (guards.rollbacks)")
        self.guards.rollbacks += 1
        shapes, self.state = shapes_of(self.state), None  # freed before the other is there
        if self.checkpoints.latest is None:
            params = {name: part.params for name, part in self._parts().items()}
            self.state, to = init_state(self._components.mesh, params, self._tx), 0
            self.kl = self._config.kl.coef
        else:
            self.state, note = self.checkpoints.restore(shapes)
            self.kl, to = note["kl"], note["iteration"]
        told = f"{why}; back to the state before iteration {to}"
        self._components.console.print(f"[yellow]{escape(told)}[/]", highlight=False)

    def _on_bad_step(self, step: int, where: str, inputs: StepInputs, metrics: Mapping[str, Any]) -> None:
        """Keep the first update that was none, and do as `guards.nonfinite` says."""
        guards = self._components.config.guards
        told = (
            f"RL iteration {self.iteration}, {where}: loss and gradient norm must be finite; got "
            f"{metrics['loss']} and {metrics['grad_norm']}"
        )
        if not self._kept_bad_step:
            self._kept_bad_step = True
            path = self._components.run.bad_step(f"{self.iteration}_{step}")
            whole = jax.jit(lambda tree: tree, out_shardings=replicated(self._components.mesh))
            save_arrays(path, whole(inputs))
            if guards.save_state:
                kept = Checkpoints(path.with_suffix(""))
                if kept.latest is None:
                    kept.save(self.iteration, self.state, {"iteration": self.iteration})
                kept.close()
            told += f"; kept for RLTrainer.replay: {path}"
        if guards.nonfinite == "stop":
            raise UserError(told)
        if guards.nonfinite == "rollback":
            self._roll_back(told)
        else:
            self._components.console.print(f"[yellow]{escape(told)}; skipped[/]", highlight=False)

    def replay(self, path: Path) -> dict[str, float]:
        """The metrics of an update that was kept in `path`, done again, from the state before it where that was kept.

        The trainer's own state is used up: make another one to train on.
        """
        if path.with_suffix("").is_dir():
            kept = Checkpoints(path.with_suffix(""))
            self.state, _ = kept.restore(shapes_of(self.state))
            kept.close()
        with np.load(path) as file:
            files = set(file.files)
        fields = {name.removeprefix("targets.") for name in files if name.startswith("targets.")}
        names = {field.name: f"batch.{field.name}" in files or None for field in dataclasses.fields(TrainBatch)}
        like = StepInputs(
            TrainBatch(**names),  # type: ignore[arg-type]  # placeholders
            Targets(**dict.fromkeys(fields, 0)),  # type: ignore[arg-type]
            0,
            0,
        )
        inputs: StepInputs = load_arrays(path, like)
        batch, targets = (device_put_batch(self._components.mesh, tree) for tree in (inputs.batch, inputs.targets))
        _, metrics = self._step(self.state, batch, targets, inputs.lr_scale, self._frozen, inputs.kl)
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def update(self, trajectories: Sequence[Trajectory], scores: Scores) -> dict[str, float]:
        """One iteration: reference and values, advantages, then an epoch or more of clipped updates."""
        config, mesh = self._config, self._components.mesh
        if self._components.shares_prefixes:
            trajectories = [
                dataclasses.replace(t, samples=share_prefixes(t.samples, config.row_length)) for t in trajectories
            ]
        rng = np.random.default_rng((self._components.config.seed, self.iteration))
        groups = number_groups(trajectories)
        is_equal = equal_groups(scores.rewards, groups, totals=config.returns == "total")
        is_kept = np.ones_like(is_equal)
        is_grouped = ALGORITHMS[config.algorithm].is_grouped
        if is_grouped and config.drop_zero_variance and not is_equal.all():  # an iteration is never empty
            is_kept = ~is_equal
        kept, rest = (np.flatnonzero(x).tolist() for x in (is_kept, ~is_kept))

        def earned(some: list[int]) -> tuple[list[Trajectory], list[np.ndarray]]:
            return [trajectories[i] for i in some], [scores.rewards[i] for i in some]

        host = minibatches(*earned(kept), row_length=config.row_length, batch_rows=config.batch_rows, rng=rng)
        left_out = pack_trajectories(*earned(rest), row_length=config.row_length, first=len(kept))
        table = tabulate([*host, left_out], groups[kept + rest])
        batches: list[TrainBatch] = [device_put_batch(mesh, batch) for batch in host]
        scored = [self._score(self.state.params, self._ref_params, batch, self._frozen) for batch in batches]
        targets, stats = self._estimate(
            [found for found, _ in scored], table, self.kl, (config.batch_rows, config.row_length)
        )
        logs, num_bad = [metrics for _, metrics in scored], 0
        order = [i for _ in range(config.epochs) for i in rng.permutation(len(batches))]
        for number, i in enumerate(order):
            progress = (self.iteration + (number + 1) / len(order)) / config.iterations
            lr_scale = optimizer.schedule(progress, config.warmup, 0.1)
            self.state, metrics = self._step(
                self.state, batches[i], targets[i], lr_scale, self._frozen, np.float32(self.kl)
            )
            metrics = jax.device_get(metrics)
            if not is_finite(metrics):
                num_bad += 1
                inputs = StepInputs(batches[i], targets[i], lr_scale, np.float32(self.kl))
                self._on_bad_step(number, f"update {number + 1} of {len(order)} (batch {i})", inputs, metrics)
                if self._components.config.guards.nonfinite == "rollback":
                    break
                continue
            sampler_gap = metrics.pop("sampler_gap")
            logs.append(metrics | ({} if number else {"sampler_gap": sampler_gap}))  # later the policy has moved
        self.iteration += 1
        means = mean_metrics([*jax.device_get(logs), jax.device_get(stats)])
        means["fill"] = float(np.mean([fill_fraction(batch) for batch in host]))
        means["learnt_from"] = len(kept) / len(trajectories)
        means["equal_groups"] = len(np.unique(groups[is_equal])) / len(np.unique(groups))
        means |= {"bad_steps": float(num_bad)} if num_bad else {}
        if config.kl.target > 0:
            means["kl_weight"] = self.kl
        if config.kl.target > 0 and not num_bad:
            self.kl = adapted_kl(self.kl, means["kl"], config.kl.target, config.kl.adaptation_rate)
        return means


def shapes_of(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def mean_metrics(logs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of each metric the mean over the updates that tell it."""
    values: dict[str, list[float]] = {}
    for metrics in logs:
        for name, value in metrics.items():
            values.setdefault(name, []).append(float(value))
    return {name: float(np.mean(v)) for name, v in values.items()}


def number_groups(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """int [N]: the number of each trajectory's question, in the order they come."""
    numbers = {id: number for number, id in enumerate(dict.fromkeys(t.question.id for t in trajectories))}
    return np.asarray([numbers[t.question.id] for t in trajectories])


def equal_groups(rewards: Sequence[np.ndarray], groups: np.ndarray, *, totals: bool) -> np.ndarray:
    """bool [N]: whether all trajectories of one's question earned the same, step by step or (`totals`) in all.

    There is nothing to learn from them by comparison, and whitening makes much of their rounding: they are left out
    (the dynamic sampling of DAPO, arXiv 2503.14476; `rl.max_resamples` plays others in their place).
    """
    table = np.zeros((len(rewards), max(map(len, rewards), default=0)), np.float32)
    for line, earned in enumerate(rewards):
        table[line, : len(earned)] = earned
    table = table.sum(axis=1, keepdims=True) if totals else table
    return np.asarray([np.ptp(table[groups == group], axis=0).max(initial=0) <= 1e-6 for group in groups])

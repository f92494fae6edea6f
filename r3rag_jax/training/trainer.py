"""The trainer of the RL phase: policy, critic, reference policy and optimizer, from iteration to iteration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from r3rag_jax.config import Config
from r3rag_jax.models import lora
from r3rag_jax.models.policy import Policy
from r3rag_jax.parallel.processes import exists
from r3rag_jax.rewards.length import add_to_last_step, overlong_penalties
from r3rag_jax.rl.algorithms import ALGORITHMS
from r3rag_jax.rl.losses import adapted_kl
from r3rag_jax.run.directory import RunDirectory, open_checkpoints
from r3rag_jax.run.provenance import Provenance
from r3rag_jax.training import optimizer
from r3rag_jax.training.batch import IterationBatches, pack_iteration
from r3rag_jax.training.experience import Experience
from r3rag_jax.training.guards import Guards
from r3rag_jax.training.prefix_tree import share_prefixes
from r3rag_jax.training.recovery import Recovery, replay
from r3rag_jax.training.rl_update import IterationTargets, RLUpdate
from r3rag_jax.training.state import RLProgress, TrainState, init_state, new_critic


class RLTrainer:
    """Starts from the cold start's policy, or from the base where there is none, or resumes from a checkpoint."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        mesh: Mesh,
        run: RunDirectory,
        console: Console,
        *,
        shares_prefixes: bool,
        provenance: Provenance,
    ):
        """
        Args:
            shares_prefixes: samples that begin alike are trained in one sequence; see `prefix_tree.py`.
            provenance: what RL begins from, now.

        Raises:
            UserError: the checkpoints are of RL that began from something else.
        """
        self.checkpoints = open_checkpoints(
            run, "rl", provenance, keep=config.rl.keep_checkpoints, keep_best=config.rl.keep_best, mesh=mesh,
            console=console,
        )  # fmt: skip
        self._config, self._policy, self._mesh, self._shares_prefixes = config, policy, mesh, shares_prefixes
        cold_start = run.policy("sft")
        self._ref_params = policy.load(cold_start) if exists(cold_start) else policy.base_params()
        self._tx = optimizer.rl_optimizer(config.rl, config.model.moment_dtype)
        modules = self._modules()
        self._frozen = modules["policy"].frozen
        self._merge = jax.jit(functools.partial(lora.merge, modules["policy"].graphdef))
        self.progress = RLProgress(self._new_state(modules), config.rl.kl.coef)
        self.guards = Guards(config.guards, config.rl)
        self.recovery = Recovery(
            config.guards, self.guards, self.checkpoints, run, mesh, console,
            start=lambda: (self._new_state(self._modules()), config.rl.kl.coef),
        )  # fmt: skip
        self.dev_score: float | None = None  # of the iteration just done, in EM; None: it was not evaluated
        self._resume()
        self.updates = RLUpdate(config, mesh, modules, policy.graphdef, self._ref_params, self._tx, self.progress.state)

    @property
    def iteration(self) -> int:
        """The next iteration; all before it are done."""
        return self.progress.iteration

    @property
    def policy_params(self) -> Any:
        """Parameters of the current policy for rollouts and export, its adapters merged."""
        trained = self.progress.state.params["policy"]
        return trained if self._frozen is None else self._merge(trained, self._frozen)

    @property
    def reference_params(self) -> Any:
        """Parameters of the policy that RL began from, which it does not change."""
        return self._ref_params

    def _modules(self) -> dict[str, lora.TrainableSplit]:
        """Policy and critic as they are before RL."""
        modules = {"policy": self._policy.trainable(self._ref_params)}
        if ALGORITHMS[self._config.rl.algorithm].needs_critic:
            policy = modules["policy"]
            decoder = lora.join(policy.graphdef, policy.params, policy.frozen)
            critic = new_critic(decoder, self._config.rl.critic.kind)
            modules["critic"] = lora.split_trainable(critic, self._config.lora)
        return modules

    def _new_state(self, modules: Mapping[str, lora.TrainableSplit]) -> TrainState:
        return init_state(self._mesh, {name: module.params for name, module in modules.items()}, self._tx)

    def _resume(self) -> None:
        if self.checkpoints.latest is not None:
            state, note = self.checkpoints.restore(self.progress.state)
            self.progress = RLProgress(state, note["kl"], note["iteration"])
            self.guards.set_state(note["guards"])

    def pack(self, experience: Experience) -> IterationBatches:
        """Pack the trajectories of the iteration into batches; deterministic in seed and iteration."""
        config, trajectories = self._config.rl, experience.trajectories
        penalties = overlong_penalties(
            [trajectory.num_policy_tokens for trajectory in trajectories],
            limit=self._config.rollout.max_sampled_tokens,
            share=config.overlong_share,
        )
        rewards = add_to_last_step(experience.scores.rewards, penalties)
        if self._shares_prefixes:
            trajectories = [
                dataclasses.replace(t, samples=share_prefixes(t.samples, config.row_length)) for t in trajectories
            ]
        rng = np.random.default_rng((self._config.seed, self.iteration))
        packed = pack_iteration(trajectories, rewards, experience.zero_variance, config, rng)
        if config.overlong_share > 0:
            packed.metrics["overlong_penalty"] = float(penalties.mean())
        return packed

    def targets(self, packed: IterationBatches) -> IterationTargets:
        """Advantages, and with a critic returns, of the iteration's batches."""
        return self.updates.targets(self.progress, packed)

    def update(self, targets: IterationTargets) -> dict[str, float]:
        """One or more epochs of updates, which end the iteration; returns metrics.

        Raises:
            UserError: an update was not finite, and `guards.nonfinite` ends RL.
        """
        progress, config = self.progress, self._config.rl.kl
        metrics = self.updates.run(progress, targets, functools.partial(self.recovery.on_bad_step, progress))
        progress.iteration += 1
        if config.target > 0:
            metrics["kl_weight"] = progress.kl
            if "bad_steps" not in metrics:
                progress.kl = adapted_kl(progress.kl, metrics["kl"], config.target, config.adaptation_rate)
        return metrics

    def guard(self, metrics: Mapping[str, float]) -> bool:
        """Act if the iteration just done broke a threshold of `guards`; returns whether RL was rolled back.

        Raises:
            UserError: RL ends here.
        """
        rollbacks = self.guards.rollbacks
        self.recovery.check(self.progress, metrics)
        return self.guards.rollbacks > rollbacks

    def save(self) -> None:
        """Write a checkpoint, unless the state may have to be rolled back."""
        if self.guards.is_clean or self._config.guards.action != "rollback":
            progress = self.progress
            note = {"iteration": progress.iteration, "kl": progress.kl, "guards": self.guards.get_state()}
            self.checkpoints.save(progress.iteration, progress.state, note, score=self.dev_score)

    def replay(self, path: Path) -> dict[str, float]:
        """Repeat the update whose inputs were kept in `path`; see `recovery.replay`. Train on with another trainer."""
        return replay(path, self.progress, self.updates, self._mesh)

"""The trainer of the RL phase: what it holds between iterations, and one iteration's updates."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from r3rag_jax import learner
from r3rag_jax.batch import fill_fraction, minibatches, pack_trajectories, tabulate
from r3rag_jax.checkpoint import Checkpoints
from r3rag_jax.models import lora
from r3rag_jax.rewards.score import Scores
from r3rag_jax.rl.distribution import Truncation
from r3rag_jax.rl.losses import adapted_kl
from r3rag_jax.session import Session
from r3rag_jax.sharding import put_batch
from r3rag_jax.types import TrainBatch, Trajectory


class RLTrainer:
    """What RL holds: policy, critic, frozen reference, optimizer, weight of the KL; resumes by itself."""

    def __init__(self, session: Session):
        self._session, self._config = session, session.config.rl
        start = session.phase_params("sft") if session.policy_dir("sft").exists() else session.base_params()
        self._ref_params = start
        parts = {"policy": session.trainable_policy(start)}
        if self._config.has_critic:
            policy = parts["policy"]
            critic = learner.new_critic(lora.join(policy.graphdef, policy.params, policy.frozen), self._config.critic)
            parts["critic"] = lora.Parts.of(critic, session.config.lora)
        graphdefs = {name: part.graphdef for name, part in parts.items()}
        self._frozen = {name: part.frozen for name, part in parts.items()}
        self._merge = jax.jit(functools.partial(lora.merge, parts["policy"].graphdef))
        tx = learner.rl_optimizer(self._config)
        self.state = learner.init_state(session.mesh, {name: part.params for name, part in parts.items()}, tx)
        self.iteration, self.kl = 0, self._config.kl
        self.checkpoints = Checkpoints(session.run_dir, "rl")
        if self.checkpoints.latest is not None:
            self.state, note = self.checkpoints.restore(self.state)
            self.iteration, self.kl = note["iteration"], note["kl"]
        session.log.rewind("rl", self.iteration)
        model, truncation = session.config.model, Truncation.of(session.config.rollout)
        self._score = learner.make_scorer(session.mesh, graphdefs, session.graphdef, model, self._config, truncation)
        self._estimate = learner.make_estimator(session.mesh, self._config, num_steps=session.config.rollout.max_steps)
        self._step = learner.make_rl_step(session.mesh, graphdefs, tx, model, self._config, self.state, truncation)

    @property
    def policy_params(self) -> Any:
        """What rollouts and export take: today's policy, its adapters merged."""
        trained, frozen = self.state.params["policy"], self._frozen["policy"]
        return trained if frozen is None else self._merge(trained, frozen)

    def save(self) -> None:
        self.checkpoints.save(self.iteration, self.state, {"iteration": self.iteration, "kl": self.kl})

    def update(self, trajectories: Sequence[Trajectory], scores: Scores) -> dict[str, float]:
        """One iteration: reference and values, advantages, then an epoch or more of clipped updates."""
        config, mesh = self._config, self._session.mesh
        rng = np.random.default_rng((self._session.config.seed, self.iteration))
        groups = number_groups(trajectories)
        is_equal = equal_groups(scores.rewards, groups, totals=config.returns == "total")
        is_kept = np.ones_like(is_equal)
        if config.is_grouped and config.drop_equal and not is_equal.all():  # an iteration is never empty
            is_kept = ~is_equal
        kept, rest = (np.flatnonzero(x).tolist() for x in (is_kept, ~is_kept))

        def earned(some: list[int]) -> tuple[list[Trajectory], list[np.ndarray]]:
            return [trajectories[i] for i in some], [scores.rewards[i] for i in some]

        host = minibatches(*earned(kept), row_length=config.row_length, batch_rows=config.batch_rows, rng=rng)
        left_out = pack_trajectories(*earned(rest), row_length=config.row_length, first=len(kept))
        table = tabulate([*host, left_out], groups[kept + rest])
        batches: list[TrainBatch] = [put_batch(mesh, batch) for batch in host]
        scored = [self._score(self.state.params, self._ref_params, batch, self._frozen) for batch in batches]
        targets, stats = self._estimate(
            [found for found, _ in scored], table, self.kl, (config.batch_rows, config.row_length)
        )
        logs = [metrics for _, metrics in scored]
        order = [i for _ in range(config.epochs) for i in rng.permutation(len(batches))]
        for number, i in enumerate(order):
            progress = (self.iteration + (number + 1) / len(order)) / config.iterations
            lr_scale = learner.schedule(progress, config.warmup, 0.1)
            self.state, metrics = self._step(
                self.state, batches[i], targets[i], lr_scale, self._frozen, np.float32(self.kl)
            )
            sampler_gap = metrics.pop("sampler_gap")
            logs.append(metrics | ({} if number else {"sampler_gap": sampler_gap}))  # later the policy has moved
        self.iteration += 1
        means = mean_metrics([*jax.device_get(logs), jax.device_get(stats)])
        means["fill"] = float(np.mean([fill_fraction(batch) for batch in host]))
        means["learnt_from"] = len(kept) / len(trajectories)
        means["equal_groups"] = len(np.unique(groups[is_equal])) / len(np.unique(groups))
        if config.kl_target > 0:
            means["kl_weight"] = self.kl
            self.kl = adapted_kl(self.kl, means["kl"], config.kl_target, config.kl_rate)
        return means


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
    (the dynamic sampling of DAPO, arXiv 2503.14476, without drawing others in their place).
    """
    table = np.zeros((len(rewards), max(map(len, rewards), default=0)), np.float32)
    for line, earned in enumerate(rewards):
        table[line, : len(earned)] = earned
    table = table.sum(axis=1, keepdims=True) if totals else table
    return np.asarray([np.ptp(table[groups == group], axis=0).max(initial=0) <= 1e-6 for group in groups])

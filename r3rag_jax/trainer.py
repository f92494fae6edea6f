"""The trainer of the RL phase: what it holds between iterations, and one iteration's updates."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from r3rag_jax import learner
from r3rag_jax.batch import fill_fraction, minibatches
from r3rag_jax.checkpoint import Checkpoints
from r3rag_jax.models import lora
from r3rag_jax.rewards.score import Scores
from r3rag_jax.rl.advantages import group_baseline
from r3rag_jax.rl.distribution import Truncation
from r3rag_jax.session import Session
from r3rag_jax.sharding import put_batch
from r3rag_jax.types import TrainBatch, Trajectory


class RLTrainer:
    """The learner of the RL phase: policy, critic, frozen reference, optimizer; resumes by itself."""

    def __init__(self, session: Session):
        self._session, self._config = session, session.config.rl
        start = session.phase_params("sft") if session.policy_dir("sft").exists() else session.base_params()
        self._ref_params = start
        parts = {"policy": session.trainable_policy(start)}
        if self._config.critic != "none":
            policy = parts["policy"]
            critic = learner.new_critic(lora.join(policy.graphdef, policy.params, policy.frozen), self._config.critic)
            parts["critic"] = lora.Parts.of(critic, session.config.lora)
        graphdefs = {name: part.graphdef for name, part in parts.items()}
        self._frozen = {name: part.frozen for name, part in parts.items()}
        self._merge = jax.jit(functools.partial(lora.merge, parts["policy"].graphdef))
        tx = learner.rl_optimizer(self._config)
        self.state = learner.init_state(session.mesh, {name: part.params for name, part in parts.items()}, tx)
        self.iteration = 0
        self.checkpoints = Checkpoints(session.run_dir, "rl")
        if self.checkpoints.latest is not None:
            self.state, note = self.checkpoints.restore(self.state)
            self.iteration = note["iteration"]
        session.log.rewind("rl", self.iteration)
        model, truncation = session.config.model, Truncation.of(session.config.rollout)
        self._score = learner.make_scorer(session.mesh, graphdefs, session.graphdef, model, self._config, truncation)
        self._step = learner.make_rl_step(session.mesh, graphdefs, tx, model, self._config, self.state, truncation)

    @property
    def policy_params(self) -> Any:
        """What rollouts and export take: today's policy, its adapters merged."""
        trained, frozen = self.state.params["policy"], self._frozen["policy"]
        return trained if frozen is None else self._merge(trained, frozen)

    def save(self) -> None:
        self.checkpoints.save(self.iteration, self.state, {"iteration": self.iteration})

    def update(self, trajectories: Sequence[Trajectory], scores: Scores) -> dict[str, float]:
        """One PPO iteration: reference and values, advantages, then an epoch or more of clipped updates."""
        config, mesh = self._config, self._session.mesh
        rng = np.random.default_rng((self._session.config.seed, self.iteration))
        rewards, played = scores.rewards, len(trajectories)
        credit = config.credit
        if config.baseline == "group":
            discount = config.step_discount if credit == "trajectory" else 0.0
            trajectories, rewards = relative_to_group(trajectories, rewards, discount)
            credit = "step"  # of what is still to come each step has been credited with its share
        host = minibatches(trajectories, rewards, row_length=config.row_length,
                           batch_rows=config.batch_rows, credit=credit, rng=rng)  # fmt: skip
        batches: list[TrainBatch] = [put_batch(mesh, batch) for batch in host]
        scored = [self._score(self.state.params, self._ref_params, batch, self._frozen) for batch in batches]
        targets, stats = learner.whiten_all(
            [t for t, _ in scored], [b.loss_mask for b in batches], config.negative_weight
        )
        logs = [metrics for _, metrics in scored]
        order = [i for _ in range(config.epochs) for i in rng.permutation(len(batches))]
        for number, i in enumerate(order):
            progress = (self.iteration + (number + 1) / len(order)) / config.iterations
            lr_scale = learner.schedule(progress, config.warmup, 0.1)
            self.state, metrics = self._step(self.state, batches[i], targets[i], lr_scale, self._frozen)
            sampler_gap = metrics.pop("sampler_gap")
            logs.append(metrics | ({} if number else {"sampler_gap": sampler_gap}))  # later the policy has moved
        self.iteration += 1
        values: dict[str, list[float]] = {}
        for metrics in [*jax.device_get(logs), jax.device_get(stats)]:
            for name, value in metrics.items():
                values.setdefault(name, []).append(float(value))
        means = {name: float(np.mean(v)) for name, v in values.items()}
        means["fill"] = float(np.mean([fill_fraction(batch) for batch in host]))
        return means | {"learnt_from": len(trajectories) / played}


def relative_to_group(
    trajectories: Sequence[Trajectory], rewards: Sequence[np.ndarray], discount: float
) -> tuple[list[Trajectory], list[np.ndarray]]:
    """Trajectories to learn from, and the return of each of their steps, counted from the group baseline.

    G_k = r_k + discount G_(k+1), less what the question's other trajectories return from step k on. Where all
    trajectories of a question earned the same step by step there is nothing to learn: they are left out, unless that
    leaves none (the dynamic sampling of DAPO, arXiv 2503.14476, without drawing more).
    """
    numbers = {id: number for number, id in enumerate(dict.fromkeys(t.question.id for t in trajectories))}
    groups = np.asarray([numbers[t.question.id] for t in trajectories])
    table = np.zeros((len(rewards), max(map(len, rewards))), np.float32)
    mask = np.zeros_like(table, bool)
    for row, r in enumerate(rewards):
        table[row, : len(r)], mask[row, : len(r)] = r, True
    returns = table.copy()
    for step in range(table.shape[1] - 2, -1, -1):
        returns[:, step] += discount * returns[:, step + 1]
    relative = returns - np.asarray(group_baseline(returns, mask, groups, num_groups=len(trajectories)))
    differs = np.asarray([np.ptp(table[groups == group], axis=0).max() > 1e-6 for group in groups])
    kept = np.flatnonzero(differs if differs.any() else np.ones_like(differs)).tolist()
    return [trajectories[i] for i in kept], [relative[i, : len(rewards[i])] for i in kept]

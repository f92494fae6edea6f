"""The RL phase: policy gradients against the live retriever."""

from __future__ import annotations

import time
from typing import Any

from r3rag_jax.config import RLConfig
from r3rag_jax.data.trajectories import trajectory_to_dict
from r3rag_jax.rewards.answer import answer_metrics
from r3rag_jax.rewards.scorer import learnable
from r3rag_jax.rollout.prefetch import Prefetcher
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.run.progress import ProgressBar, num_compiled
from r3rag_jax.training.parts import RolloutParts, TrainingParts
from r3rag_jax.training.rollout_metrics import rollout_metrics
from r3rag_jax.training.sampling import IterationSampler
from r3rag_jax.training.trainer import RLTrainer


def run_rl(parts: TrainingParts, rollouts: RolloutParts) -> None:
    """Train the policy from the cold start (or the base where there is none), and export it; resumes by itself."""
    config = parts.config.rl
    trainer = RLTrainer(parts)
    rollouts.kept.rewind(trainer.iteration)
    sampler = IterationSampler(parts, rollouts)
    live = parts.config.log.progress
    bar = ProgressBar("RL", config.iterations, console=parts.console, live=live, done=trainer.iteration)
    with bar, Prefetcher(rollouts.copy_policy, sampler.sample) as prefetcher:
        while trainer.iteration < config.iterations:
            started, number, compiled = time.monotonic(), trainer.iteration, num_compiled()
            num_rollbacks = trainer.guards.rollbacks
            sampled = prefetcher.result(number, trainer.policy_params)
            if config.async_rollouts and _may_overlap(config, number + 1, bool(rollouts.dev_questions)):
                prefetcher.start(number + 1, trainer.policy_params)
            scores = sampled.scores or rollouts.scorer.score(sampled.trajectories)
            metrics = rollout_metrics(sampled.trajectories, scores) | {"rollout_s": time.monotonic() - started}
            trajectories, scores = learnable(sampled.trajectories, scores)
            metrics |= trainer.update(trajectories, scores)
            if rollouts.dev_questions and trainer.iteration % config.eval_every == 0:
                metrics["dev_em"] = dev_em(rollouts, trainer.policy_params)
            tokens = sum(len(sample) for trajectory in trajectories for sample in trajectory.samples)
            metrics["tokens_per_s"] = tokens / (time.monotonic() - started)
            metrics["num_compiled"] = num_compiled() - compiled
            parts.log.write("rl", number, metrics)
            trainer.guard(metrics)
            if trainer.guards.rollbacks > num_rollbacks:
                prefetcher.discard()
            chosen = [(trajectories[i], scores.rewards[i]) for i in rollouts.kept.choose(len(trajectories))]
            rollouts.kept.write(number, [trajectory_to_dict(t) | {"reward": float(r.sum())} for t, r in chosen])
            bar.advance(reward=metrics["reward"], em=100 * metrics["em"], tokens_per_s=metrics["tokens_per_s"])
            if trainer.iteration % config.checkpoint_every == 0 and trainer.iteration < config.iterations:
                trainer.save()
    parts.policy.save(parts.run.policy("rl"), trainer.policy_params)
    trainer.checkpoints.close()


def _may_overlap(config: RLConfig, following: int, has_dev: bool) -> bool:
    """Whether the rollouts of an iteration may run beside the update before it.

    Not across a checkpoint, which a run may resume from, nor across an evaluation, which needs the sampler itself.
    """
    is_evaluated = has_dev and following % config.eval_every == 0
    return following < config.iterations and following % config.checkpoint_every != 0 and not is_evaluated


def dev_em(rollouts: RolloutParts, params: Any) -> float:
    """Exact match of greedy rollouts on the dev questions, in [0, 1]."""
    requests = [RolloutRequest(question) for question in rollouts.dev_questions]
    trajectories = rollouts.rollout(rollouts.copy_policy(params), requests)
    percent = float(100 * answer_metrics(trajectories)["em"].mean())  # as evaluations report it
    return percent / 100

"""The RL phase: policy gradients against the live retriever."""

from __future__ import annotations

import functools
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from r3rag_jax.components import Components
from r3rag_jax.data.trajectories import trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.evaluator import summarise
from r3rag_jax.rewards.scorer import learnable
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.run.progress import ProgressBar, num_compiled
from r3rag_jax.run.trajectories import TrajectoryLog
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.training.requests import iteration_jobs, more_jobs
from r3rag_jax.training.rollout_metrics import rollout_metrics
from r3rag_jax.training.trainer import RLTrainer, equal_groups, number_groups
from r3rag_jax.types import Trajectory


def rl_phase(components: Components) -> bool:
    """Policy gradients against the live retriever, from the cold start (or the base where there is none)."""
    config = components.config.rl
    if components.policy_dir("rl").exists():
        return False
    trainer = RLTrainer(components)
    kept = TrajectoryLog(components.run.trajectories("rl"), components.config.log.trajectories, components.trackers)
    kept.rewind(trainer.iteration)
    rollouts, dev = Rollouts(components), components.dataset.questions("dev")
    bar = ProgressBar("RL", config.iterations, console=components.console, live=components.config.log.progress,
                      done=trainer.iteration)  # fmt: skip

    def is_at(number: int, every: int) -> bool:
        return number % every == 0

    with bar, rollouts:
        while trainer.iteration < config.iterations:
            started, number, compiled = time.monotonic(), trainer.iteration, num_compiled()
            num_rollbacks = trainer.guards.rollbacks
            trajectories = rollouts.of(number, trainer.policy_params)
            following = number + 1
            # Not across a checkpoint, which a run may resume from, nor an evaluation, which takes the sampler itself.
            is_free = not (is_at(following, config.checkpoint_every) or (dev and is_at(following, config.eval_every)))
            if config.async_rollouts and is_free and following < config.iterations:
                rollouts.start(following, trainer.policy_params)
            scores = components.scorer.score(trajectories)
            metrics = rollout_metrics(trajectories, scores) | {"rollout_s": time.monotonic() - started}
            trajectories, scores = learnable(trajectories, scores)
            metrics |= trainer.update(trajectories, scores)
            if dev and is_at(trainer.iteration, config.eval_every):
                backend = components.engine_backend(components.to_sampler(trainer.policy_params))
                requests = [RolloutRequest(question) for question in dev]
                dev_trajectories = rollout(backend, components.search_env, components.retriever, requests,
                                           search_overlap=components.config.rollout.search_overlap)  # fmt: skip
                metrics["dev_em"] = summarise("dev", dev_trajectories, {})["groups"]["all"]["em"] / 100
            tokens = sum(len(sample) for trajectory in trajectories for sample in trajectory.samples)
            metrics["tokens_per_s"] = tokens / (time.monotonic() - started)
            metrics["num_compiled"] = num_compiled() - compiled
            components.log.write("rl", number, metrics)
            trainer.guard(metrics)
            if trainer.guards.rollbacks > num_rollbacks:
                rollouts.forget()
            kept.write(number, [trajectory_to_dict(trajectories[i]) | {"reward": float(scores.rewards[i].sum())}
                                for i in kept.choose(len(trajectories))])  # fmt: skip
            bar.advance(reward=metrics["reward"], em=100 * metrics["em"], tokens_per_s=metrics["tokens_per_s"])
            if is_at(trainer.iteration, config.checkpoint_every) and trainer.iteration < config.iterations:
                trainer.save()
    components.policy.save(components.policy_dir("rl"), trainer.policy_params)
    trainer.checkpoints.close()
    return True


class Rollouts:
    """The trajectories of each iteration, sampled when asked for or, with `rl.async_rollouts`, in a thread before.

    What is sampled ahead has the policy before the update beside it, so the ratios of PPO correct for one update more:
    they are to the log-probabilities that were recorded. Weights change without a new compilation.
    """

    def __init__(self, components: Components):
        mesh = components.sampler_mesh
        if components.config.rl.async_rollouts and mesh is components.mesh and mesh.size > 1:
            raise UserError(
                "rl.async_rollouts must have one device, or mesh.sampler_devices of its own: two threads cannot "
                f"launch programs on the same {mesh.size} devices; got mesh.sampler_devices="
                f"{components.config.mesh.sampler_devices}"
            )
        self._components, self._questions = components, components.dataset.questions("rl")
        self._search_env = components.search_env
        self._thread = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[list[Trajectory]]] | None = None

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def of(self, iteration: int, params: Any) -> list[Trajectory]:
        """Those started for the iteration, or else sampled now by the policy of `params`."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == iteration:
            return ahead[1].result()
        return self._play(iteration, self._components.to_sampler(params))

    def start(self, iteration: int, params: Any) -> None:
        """Sample the iteration's in a thread; `params` may be donated as soon as this returns."""
        self._ahead = iteration, self._thread.submit(self._play, iteration, self._components.to_sampler(params))

    def forget(self) -> None:
        """Leave what was started alone: it is of a policy that is no more."""
        if self._ahead is not None:
            self._ahead[1].result()
        self._ahead = None

    def _play(self, iteration: int, policy: CachedDecoder) -> list[Trajectory]:
        """With `rl.max_resamples`, also those of questions drawn in the place of those that teach nothing."""
        config, components = self._components.config, self._components
        backend = components.engine_backend(policy)
        sample = functools.partial(rollout, backend, self._search_env, components.retriever,
                                   search_overlap=config.rollout.search_overlap)  # fmt: skip
        trajectories = sample(iteration_jobs(config, self._questions, iteration))
        for draw in range(1, 1 + config.rl.max_resamples):
            known, scores = learnable(trajectories, components.scorer.score(trajectories))
            groups = number_groups(known)
            is_equal = equal_groups(scores.rewards, groups, totals=config.rl.returns == "total")
            num_missing = config.rl.questions - len(np.unique(groups[~is_equal]))
            taken = {trajectory.question.id for trajectory in trajectories}
            jobs = more_jobs(config, self._questions, iteration, draw, num_missing, taken)
            if not jobs:
                break
            trajectories = trajectories + sample(jobs)
        return trajectories

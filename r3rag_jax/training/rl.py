"""The RL phase: policy gradients against the live retriever."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from r3rag_jax.config import Config
from r3rag_jax.data.trajectories import trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.models.policy import Policy
from r3rag_jax.parallel.processes import failures_told
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.rewards.scorer import Scorer
from r3rag_jax.rollout.backend_factory import MakeBackend
from r3rag_jax.rollout.backends import RolloutBackend
from r3rag_jax.rollout.env import EnvFactory
from r3rag_jax.rollout.prefetch import Prefetcher
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.metrics import MetricsLog
from r3rag_jax.run.preemption import StopSignals
from r3rag_jax.run.progress import ProgressBar, num_compiled
from r3rag_jax.run.provenance import Provenance
from r3rag_jax.run.schedule import SaveSchedule
from r3rag_jax.run.trajectories import TrajectoryLog
from r3rag_jax.run.watchdog import moved
from r3rag_jax.training.experience import Experience, IterationSampler, Rollouts
from r3rag_jax.training.rollout_metrics import rollout_metrics
from r3rag_jax.training.trainer import RLTrainer
from r3rag_jax.types import Question


@dataclasses.dataclass(frozen=True)
class RLParts:
    """What the RL phase works with."""

    mesh: Mesh
    sampler_mesh: Mesh  # where rollouts run; `mesh` itself, or one of other devices
    policy: Policy
    make_backend: MakeBackend
    env_factory: EnvFactory
    retriever: Retriever
    make_scorer: Callable[[Any], Scorer]  # of the reference policy's parameters
    questions: Sequence[Question]
    evaluate: Callable[[RolloutBackend], dict[str, float]] | None  # metrics on the dev questions; None: there are none
    shares_prefixes: bool  # samples that begin alike are trained in one sequence
    run: RunDirectory
    provenance: Provenance
    log: MetricsLog
    trajectory_log: TrajectoryLog
    console: Console
    stop: StopSignals


def run_rl(config: Config, parts: RLParts) -> None:
    """Train from the cold start's policy, or from the base where there is none, and export the result.

    Raises:
        UserError: RL began from something else, a guard ends RL, the judge fails too often, or the settings do not fit
            the devices.
        StopRun: a signal has come; the iteration under way is done and saved.
    """
    check_devices(config, parts)
    trainer = RLTrainer(
        config, parts.policy, parts.mesh, parts.run, parts.console,
        shares_prefixes=parts.shares_prefixes, provenance=parts.provenance,
    )  # fmt: skip
    parts.log.rewind("rl", trainer.iteration)
    parts.trajectory_log.rewind(trainer.iteration)
    scorer = parts.make_scorer(trainer.reference_params)
    sampler = IterationSampler(config, parts.questions, parts.env_factory, parts.retriever, scorer)
    prefetcher: Prefetcher[Any, RolloutBackend, Rollouts] = Prefetcher(
        lambda params: parts.make_backend(lambda: params), sampler.run
    )
    bar = ProgressBar("RL", config.rl.iterations, console=parts.console, live=config.log.progress,
                      done=trainer.iteration)  # fmt: skip
    schedule = SaveSchedule(
        trainer.checkpoints, parts.stop, every=config.rl.checkpoint_every, minutes=config.rl.checkpoint_minutes,
        total=config.rl.iterations, unit="RL iteration",
    )  # fmt: skip
    with trainer.checkpoints, parts.stop.deferred(), bar, prefetcher, failures_told():
        while trainer.iteration < config.rl.iterations:
            metrics = run_iteration(config, parts, trainer, scorer, prefetcher)
            bar.advance(reward=metrics["reward"], em=100 * metrics["em"], tokens_per_s=metrics["tokens_per_s"])
            schedule.after(trainer.iteration, trainer.save)
        parts.policy.save(parts.run.policy("rl"), trainer.policy_params, parts.provenance)


def run_iteration(
    config: Config,
    parts: RLParts,
    trainer: RLTrainer,
    scorer: Scorer,
    prefetcher: Prefetcher[Any, RolloutBackend, Rollouts],
) -> dict[str, float]:
    """Rollout, rewards, advantages, update, evaluation; returns the metrics that it logs."""
    started, iteration, compiled = time.monotonic(), trainer.iteration, num_compiled()
    rollouts = prefetcher.result(iteration, trainer.policy_params)
    if may_prefetch(config, iteration + 1, has_evaluation=parts.evaluate is not None):
        prefetcher.start(iteration + 1, trainer.policy_params)
    experience = rollouts.score(scorer, totals=config.rl.returns == "total")
    metrics = rollout_metrics(experience.trajectories, experience.scores)
    metrics["rollout_s"] = time.monotonic() - started
    moved(f"RL iteration {iteration}: {len(experience.trajectories)} trajectories scored")
    experience = experience.learnable()
    targets = trainer.targets(trainer.pack(experience))
    metrics |= trainer.update(targets)
    if parts.evaluate is not None and trainer.iteration % config.rl.eval_every == 0:
        metrics |= parts.evaluate(parts.make_backend(lambda: trainer.policy_params))
    num_tokens = sum(len(sample) for trajectory in experience.trajectories for sample in trajectory.samples)
    metrics["tokens_per_s"] = num_tokens / (time.monotonic() - started)
    metrics["num_compiled"] = num_compiled() - compiled
    parts.log.write("rl", iteration, metrics)
    if trainer.guard(metrics):
        prefetcher.discard()  # its policy was rolled back
    log_trajectories(parts.trajectory_log, iteration, experience)
    return metrics


def may_prefetch(config: Config, iteration: int, *, has_evaluation: bool) -> bool:
    """Whether an iteration's rollouts may run beside the update of the iteration before.

    They may not across a checkpoint, from which a run may resume, nor across an evaluation, which needs the sampler.
    """
    rl = config.rl
    is_checkpoint = iteration % rl.checkpoint_every == 0
    is_evaluation = has_evaluation and iteration % rl.eval_every == 0
    return rl.async_rollouts and iteration < rl.iterations and not (is_checkpoint or is_evaluation)


def check_devices(config: Config, parts: RLParts) -> None:
    """Refuse asynchronous rollouts on the devices that updates run on, unless there is only one.

    Raises:
        UserError: two threads would launch programs on the same several devices.
    """
    if config.rl.async_rollouts and parts.sampler_mesh is parts.mesh and parts.mesh.size > 1:
        raise UserError(
            "rl.async_rollouts must have one device, or mesh.sampler_devices of its own: two threads cannot "
            f"launch programs on the same {parts.mesh.size} devices; got mesh.sampler_devices="
            f"{config.mesh.sampler_devices}"
        )
    is_local = config.rewards.process == "gain" or (config.rewards.needs_judge and config.judge.kind == "local")
    if config.rl.async_rollouts and config.rl.max_resamples > 0 and is_local and parts.mesh.size > 1:
        raise UserError(
            "rl.max_resamples must be 0 with rl.async_rollouts and a local judge, or rewards.process=gain: rollouts "
            f"are scored in a thread, on the {parts.mesh.size} devices of updates; got {config.rl.max_resamples}"
        )


def log_trajectories(log: TrajectoryLog, iteration: int, experience: Experience) -> None:
    """Write some of the iteration's trajectories with their rewards."""
    chosen = log.choose(len(experience.trajectories))
    rewards = experience.scores.rewards
    rows = [trajectory_to_dict(experience.trajectories[i]) | {"reward": float(rewards[i].sum())} for i in chosen]
    log.write(iteration, rows)

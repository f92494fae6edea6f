"""The RL phase: policy gradients against the live retriever."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from r3rag_jax.config import Config
from r3rag_jax.data.records import Records
from r3rag_jax.errors import ServiceError, UserError
from r3rag_jax.models.policy import Policy
from r3rag_jax.parallel.processes import failures_told
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.rewards.scorer import Scorer
from r3rag_jax.rollout.backend_factory import MakeBackend
from r3rag_jax.rollout.backends import RolloutBackend
from r3rag_jax.rollout.env import EnvFactory
from r3rag_jax.rollout.prefetch import Prefetcher
from r3rag_jax.run.directory import RunDirectory, sentences_to
from r3rag_jax.run.leftovers import report_damaged, report_gaps
from r3rag_jax.run.metrics import MetricsLog
from r3rag_jax.run.preemption import StopSignals
from r3rag_jax.run.profile import profiled
from r3rag_jax.run.progress import ProgressBar, num_compiled
from r3rag_jax.run.provenance import Provenance
from r3rag_jax.run.schedule import SaveSchedule
from r3rag_jax.run.status_lines import live_lines, summary
from r3rag_jax.run.stopwatch import Eta, Stopwatch
from r3rag_jax.run.trajectories import TrajectoryLog
from r3rag_jax.run.watchdog import moved
from r3rag_jax.sampler.engine import SamplerWork
from r3rag_jax.training.batch import IterationBatches
from r3rag_jax.training.experience import Experience, IterationSampler, Rollouts
from r3rag_jax.training.recorded import recorded_rows
from r3rag_jax.training.rl_update import IterationTargets
from r3rag_jax.training.rollout_metrics import rollout_metrics
from r3rag_jax.training.trainer import RLTrainer
from r3rag_jax.training.utilization import Utilization, Work
from r3rag_jax.types import Question


@dataclasses.dataclass(frozen=True)
class RLParts:
    """What the RL phase works with."""

    mesh: Mesh
    sampler_mesh: Mesh  # where rollouts run; `mesh` itself, or one of other devices
    policy: Policy
    make_backend: MakeBackend
    sampler_work: Callable[[], SamplerWork]  # of the engine behind the backends, so far
    utilization: Utilization | None  # None: the peak rates of the devices are not known
    env_factory: EnvFactory
    retriever: Retriever
    make_scorer: Callable[[Any], Scorer]  # of the reference policy's parameters
    questions: Records[Question]
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
        UserError: RL began from something else, a guard ends RL, or the settings do not fit the devices.
        ServiceError: the retriever or the judge stays away; what is done is saved.
        StopRun: a signal has come; the iteration under way is done and saved.
    """
    check_devices(config, parts)
    trainer = RLTrainer(
        config, parts.policy, parts.mesh, parts.run, parts.console,
        shares_prefixes=parts.shares_prefixes, provenance=parts.provenance,
    )  # fmt: skip
    rewind_logs(parts, trainer.iteration)
    scorer = parts.make_scorer(trainer.reference_params)
    sampler = IterationSampler(
        config, parts.questions, parts.env_factory, parts.retriever, scorer, parts.sampler_work
    )  # fmt: skip
    prefetcher: Prefetcher[Any, RolloutBackend, Rollouts] = Prefetcher(
        lambda params: parts.make_backend(lambda: params), sampler.run
    )
    bar = ProgressBar("RL", config.rl.iterations, console=parts.console, live=config.log.progress,
                      done=trainer.iteration)  # fmt: skip
    schedule = SaveSchedule(
        trainer.checkpoints, parts.stop, every=config.rl.checkpoint_every, minutes=config.rl.checkpoint_minutes,
        total=config.rl.iterations, unit="RL iteration",
    )  # fmt: skip
    watch, eta = Stopwatch(), Eta()
    with trainer.checkpoints, parts.stop.deferred(), bar, prefetcher, failures_told():
        while trainer.iteration < config.rl.iterations:
            iteration, checkpoint_s = trainer.iteration, watch.seconds.pop("checkpoint", 0.0)
            with schedule.saved_from_services(lambda: trainer.iteration, trainer.save):
                with profiled(parts.run.profile, config.log.profile == iteration):
                    metrics, failure = run_iteration(config, parts, trainer, scorer, prefetcher)
                metrics |= {"checkpoint_s": checkpoint_s, "eta_s": eta.after(iteration + 1, config.rl.iterations)}
                parts.log.write("rl", iteration, metrics)
                if trainer.guard(metrics):
                    prefetcher.discard()  # its policy was rolled back
                if failure is not None:
                    raise failure
            bar.show_below(live_lines(metrics))
            bar.advance(**summary(metrics))
            with watch.measure("checkpoint"):
                schedule.after(trainer.iteration, trainer.save)
        parts.policy.save(parts.run.policy("rl"), trainer.policy_params, parts.provenance)


def rewind_logs(parts: RLParts, iteration: int) -> None:
    """Drop what was logged at or after an iteration, which is about to be repeated; say what is damaged or lacks."""
    log, trajectory_log, say = parts.log, parts.trajectory_log, sentences_to(parts.console)
    if jax.process_index() == 0:
        report_damaged(log.path, say)
        report_damaged(trajectory_log.path, say)
    log.rewind("rl", iteration)
    trajectory_log.rewind(iteration)
    if jax.process_index() == 0:
        report_gaps(log.path, "rl", iteration, say)


def run_iteration(
    config: Config,
    parts: RLParts,
    trainer: RLTrainer,
    scorer: Scorer,
    prefetcher: Prefetcher[Any, RolloutBackend, Rollouts],
) -> tuple[dict[str, float], ServiceError | None]:
    """Rollout, rewards, advantages, update, evaluation; logs some trajectories.

    Returns:
        The metrics; and why the evaluation failed. The iteration is done without it.

    Raises:
        ServiceError: the retriever or the judge stays away.
    """
    watch, iteration, compiled, rl = Stopwatch(), trainer.iteration, num_compiled(), config.rl
    staleness, failure = float(prefetcher.has_started(iteration)), None
    with watch.measure("iteration"):
        with watch.measure("rollout_wait"):
            rollouts = prefetcher.result(iteration, trainer.policy_params)
        if may_prefetch(config, iteration + 1, has_evaluation=parts.evaluate is not None):
            prefetcher.start(iteration + 1, trainer.policy_params)
        with watch.measure("score"):
            experience = rollouts.score(scorer, totals=rl.returns == "total")
        metrics = rollout_metrics(experience.trajectories, experience.scores) | rollouts.metrics
        moved(f"RL iteration {iteration}: {len(experience.trajectories)} trajectories scored")
        experience = experience.learnable()
        with watch.measure("update"):
            packed = trainer.pack(experience)
            targets = trainer.targets(packed)
            metrics |= trainer.update(targets)
        if parts.evaluate is not None and trainer.iteration % rl.eval_every == 0:
            with watch.measure("eval"):
                evaluated, failure = evaluate(parts, trainer)
                metrics |= evaluated
    num_tokens = sum(len(sample) for trajectory in experience.trajectories for sample in trajectory.samples)
    metrics |= timing_metrics(watch, metrics, num_tokens)
    metrics |= {"staleness": staleness, "num_compiled": float(num_compiled() - compiled)}
    if parts.utilization is not None:
        metrics |= parts.utilization.rl(Work.of(packed.batches), metrics["update_s"])
        metrics |= parts.utilization.decoding(rollouts.bytes_read, metrics["decode_s"])
    log_trajectories(config, parts, iteration, experience, packed, targets)
    trainer.dev_score = metrics.get("dev_em")
    return metrics, failure


def evaluate(parts: RLParts, trainer: RLTrainer) -> tuple[dict[str, float], ServiceError | None]:
    """Metrics on the dev questions; none, and why, where the retriever stays away."""
    assert parts.evaluate is not None
    try:
        return parts.evaluate(parts.make_backend(lambda: trainer.policy_params)), None
    except ServiceError as error:
        return {}, error


def timing_metrics(watch: Stopwatch, metrics: Mapping[str, float], num_tokens: int) -> dict[str, float]:
    """Where the time of an iteration went, in seconds, and the tokens that it has trained on per second.

    Args:
        watch: seconds of the iteration and of its parts.
        metrics: with the seconds of scoring while replacements were sampled.
        num_tokens: of the trajectories, prompts and passages included.
    """
    seconds = {f"{name}_s": float(value) for name, value in watch.seconds.items()}
    seconds["rollout_s"] = seconds["rollout_wait_s"] + seconds["score_s"]
    seconds["score_s"] += metrics["score_s"]
    return seconds | {"tokens_per_s": num_tokens / seconds["iteration_s"]}


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


def log_trajectories(
    config: Config,
    parts: RLParts,
    iteration: int,
    experience: Experience,
    packed: IterationBatches,
    targets: IterationTargets,
) -> None:
    """Write some of the iteration's trajectories, all samples of a question together, with rewards and advantages."""
    chosen = parts.trajectory_log.choose([trajectory.question.id for trajectory in experience.trajectories])
    tokenizer = parts.policy.tokenizer if config.log.tokens else None
    parts.trajectory_log.write(
        iteration, recorded_rows(experience, chosen, packed, targets.recorded, tokenizer)
    )  # fmt: skip

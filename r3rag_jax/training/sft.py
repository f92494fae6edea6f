"""The cold start: next-token prediction of the teacher's steps."""

from __future__ import annotations

import dataclasses
import time

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape

from r3rag_jax.config import Config
from r3rag_jax.data.records import OnError, Records
from r3rag_jax.data.sft import FlatSamples, SFTBatches, SFTSample
from r3rag_jax.errors import UserError
from r3rag_jax.models import lora
from r3rag_jax.models.policy import Policy
from r3rag_jax.parallel.local_rows import device_put_rows, local_rows
from r3rag_jax.parallel.processes import failures_told
from r3rag_jax.run.checkpoints import save_arrays
from r3rag_jax.run.directory import RunDirectory, open_checkpoints, sentences_to
from r3rag_jax.run.leftovers import report_damaged, report_gaps
from r3rag_jax.run.metrics import MetricsLog
from r3rag_jax.run.preemption import StopSignals
from r3rag_jax.run.progress import ProgressBar
from r3rag_jax.run.provenance import Provenance
from r3rag_jax.run.schedule import SaveSchedule
from r3rag_jax.text.transcript import Codec, teacher_samples
from r3rag_jax.training import optimizer
from r3rag_jax.training.guards import is_finite
from r3rag_jax.training.prefix_tree import share_prefixes
from r3rag_jax.training.state import init_state
from r3rag_jax.training.steps import make_sft_step
from r3rag_jax.training.utilization import Utilization, Work
from r3rag_jax.types import Sample, SFTBatch, Trajectory


@dataclasses.dataclass(frozen=True)
class SFTParts:
    """What the cold start works with."""

    mesh: Mesh
    policy: Policy
    codec: Codec
    trajectories: Records[Trajectory]  # the teacher's
    shares_prefixes: bool  # samples that begin alike are trained in one sequence
    run: RunDirectory
    provenance: Provenance
    log: MetricsLog
    console: Console
    on_error: OnError
    stop: StopSignals
    utilization: Utilization | None  # None: the peak rates of the devices are not known


def run_sft(config: Config, parts: SFTParts) -> None:
    """Train from the base and export the result; resumes from the phase's checkpoint.

    Raises:
        UserError: the phase began from something else, a sample is longer than `sft.row_length` and `data.on_error` is
            stop, or a loss or gradient is not finite (`guards.nonfinite`).
        StopRun: a signal has come; the step under way is done and saved.
    """
    checkpoints = open_checkpoints(
        parts.run, "sft", parts.provenance, keep=config.sft.keep_checkpoints, mesh=parts.mesh, console=parts.console
    )
    batches = make_batches(config, parts)
    policy = parts.policy.trainable(parts.policy.base_params())
    tx = optimizer.sft_optimizer(config.sft, batches.num_steps, config.model.moment_dtype)
    state = init_state(parts.mesh, policy.params, tx)
    if checkpoints.latest is not None:
        state, note = checkpoints.restore(state)
        batches.set_state(note["batches"])
    say = sentences_to(parts.console)
    if jax.process_index() == 0:
        report_damaged(parts.log.path, say)
    parts.log.rewind("sft", batches.step)
    if jax.process_index() == 0:
        report_gaps(parts.log.path, "sft", batches.step, say)
    step = make_sft_step(parts.mesh, policy.graphdef, tx, config.model, state)
    bar = ProgressBar("cold start", batches.num_steps, console=parts.console, live=config.log.progress,
                      done=batches.step)  # fmt: skip
    schedule = SaveSchedule(
        checkpoints, parts.stop, every=config.sft.checkpoint_every, minutes=config.sft.checkpoint_minutes,
        total=batches.num_steps, unit="cold start, step",
    )  # fmt: skip

    def save() -> None:
        checkpoints.save(batches.step, state, {"batches": batches.get_state()})

    with checkpoints, parts.stop.deferred(), bar, failures_told():
        while batches.step < batches.num_steps:
            started, number = time.monotonic(), batches.step
            batch = next(batches)
            rows = device_put_rows(parts.mesh, batch, batches.rows, config.sft.batch_rows)
            state, metrics = step(state, rows, policy.frozen)
            numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not is_finite(numbers):
                report_bad_step(config, parts, number, batches.whole(number), numbers)
            took_s = time.monotonic() - started
            numbers["tokens_per_s"] = batches.num_tokens(number) / took_s
            if parts.utilization is not None:
                numbers |= parts.utilization.sft(Work.of([batches.whole(number)]), took_s)
            parts.log.write("sft", number, numbers)
            bar.advance(**{name: numbers[name] for name in ("loss", "accuracy", "tokens_per_s")})
            schedule.after(batches.step, save)
        merged = jax.jit(lora.merge, static_argnums=0)(policy.graphdef, state.params, policy.frozen)
        parts.policy.save(parts.run.policy("sft"), merged, parts.provenance)


def make_batches(config: Config, parts: SFTParts) -> SFTBatches:
    """The teacher's steps in batches of packed rows.

    Raises:
        UserError: a sample is longer than a row, and `data.on_error` is stop.
    """
    sft = config.sft

    def taught(trajectory: Trajectory) -> tuple[str, tuple[Sample, ...]]:
        samples = teacher_samples(parts.codec, trajectory)
        shared = share_prefixes(samples, sft.row_length) if parts.shares_prefixes else samples
        return trajectory.question.id, shared

    def fault_of(taught: tuple[str, tuple[Sample, ...]]) -> str | None:
        id, samples = taught
        longest = max(map(len, samples))
        rule = f"every sample must fit a row of sft.row_length={sft.row_length} tokens"
        return f"{rule}; got {longest} with question {id!r}" if longest > sft.row_length else None

    kept = parts.on_error.check(parts.trajectories.map(taught), fault_of)
    groups = kept.map(lambda taught: [SFTSample(s.ids, s.loss_mask, s.positions, s.branch_ids) for s in taught[1]])
    rows = local_rows(parts.mesh, sft.batch_rows)
    return SFTBatches(
        FlatSamples(groups), row_length=sft.row_length, batch_rows=sft.batch_rows, epochs=sft.epochs, seed=config.seed,
        rows=rows,
    )  # fmt: skip


def report_bad_step(config: Config, parts: SFTParts, number: int, batch: SFTBatch, metrics: dict[str, float]) -> None:
    """Keep the batch of an update whose loss or gradient was not finite, and act on `guards.nonfinite`.

    Raises:
        UserError: the cold start ends here.
    """
    path = parts.run.bad_step(f"sft_{number}")
    save_arrays(path, batch)
    what = (
        f"cold start, step {number}: loss and gradient norm must be finite; got {metrics['loss']} and "
        f"{metrics['grad_norm']}; its batch is kept: {path}"
    )
    if config.guards.nonfinite != "skip":
        raise UserError(what)
    parts.console.print(f"[yellow]{escape(what)}; skipped[/]", highlight=False)

"""The cold start: next-token prediction of the teacher's steps."""

from __future__ import annotations

import itertools
import time

import jax
import numpy as np
from rich.markup import escape

from r3rag_jax.components import Components
from r3rag_jax.data.sft import SFTBatches, SFTSample
from r3rag_jax.errors import UserError
from r3rag_jax.models import lora
from r3rag_jax.parallel.shardings import device_put_batch
from r3rag_jax.run.checkpoints import Checkpoints, save_arrays
from r3rag_jax.run.progress import ProgressBar
from r3rag_jax.text.transcript import teacher_samples
from r3rag_jax.training import optimizer
from r3rag_jax.training.guards import is_finite
from r3rag_jax.training.prefix_tree import share_prefixes
from r3rag_jax.training.state import init_state
from r3rag_jax.training.steps import make_sft_step
from r3rag_jax.types import SFTBatch


def sft_phase(components: Components) -> bool:
    """Cold start: next-token prediction of the teacher's steps."""
    config = components.config.sft
    if components.policy_dir("sft").exists():
        return False
    written = [teacher_samples(components.codec, t) for t in components.dataset.trajectories()]
    if components.shares_prefixes:
        written = [share_prefixes(samples, config.row_length) for samples in written]
    samples = [SFTSample(s.ids, s.loss_mask, s.positions, s.branch_ids) for s in itertools.chain(*written)]
    batches = SFTBatches(samples, row_length=config.row_length, batch_rows=config.batch_rows,
                         epochs=config.epochs, seed=components.config.seed)  # fmt: skip
    tx = optimizer.sft_optimizer(config, batches.num_steps, components.config.model.moment_dtype)
    policy = components.policy.trainable(components.policy.base_params())
    state = init_state(components.mesh, policy.params, tx)
    checkpoints = Checkpoints(components.run.checkpoints("sft"))
    if checkpoints.latest is not None:
        state, note = checkpoints.restore(state)
        batches.set_state(note["batches"])
    components.log.rewind("sft", batches.step)
    step = make_sft_step(components.mesh, policy.graphdef, tx, components.config.model, state)
    bar = ProgressBar("cold start", batches.num_steps, console=components.console,
                      live=components.config.log.progress, done=batches.step)  # fmt: skip
    with bar:
        while batches.step < batches.num_steps:
            started, number = time.monotonic(), batches.step
            batch = next(batches)
            state, metrics = step(state, device_put_batch(components.mesh, batch), policy.frozen)
            numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not is_finite(numbers):
                report_bad_step(components, number, batch, numbers)
            numbers["tokens_per_s"] = float(np.sum(batch.segment_ids > 0)) / (time.monotonic() - started)
            components.log.write("sft", number, numbers)
            bar.advance(**{name: numbers[name] for name in ("loss", "accuracy", "tokens_per_s")})
            if batches.step % config.checkpoint_every == 0 and batches.step < batches.num_steps:
                checkpoints.save(batches.step, state, {"batches": batches.get_state()})
    merged = jax.jit(lora.merge, static_argnums=0)(policy.graphdef, state.params, policy.frozen)
    components.policy.save(components.policy_dir("sft"), merged)
    checkpoints.close()
    return True


def report_bad_step(components: Components, number: int, batch: SFTBatch, numbers: dict[str, float]) -> None:
    """Keep the batch of an update that was none, and end the cold start or (`guards.nonfinite`) go on without it."""
    path = components.run.bad_step(f"sft_{number}")
    save_arrays(path, batch)
    told = (
        f"cold start, step {number}: loss and gradient norm must be finite; got {numbers['loss']} and "
        f"{numbers['grad_norm']}; its batch is kept: {path}"
    )
    if components.config.guards.nonfinite != "skip":
        raise UserError(told)
    components.console.print(f"[yellow]{escape(told)}; skipped[/]", highlight=False)

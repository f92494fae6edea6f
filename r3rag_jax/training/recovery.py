"""What RL does when an iteration or an update went wrong: warn, stop, or roll back to the last checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape

from r3rag_jax.config import GuardsConfig
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.processes import exists
from r3rag_jax.parallel.shardings import device_put_batch, replicated
from r3rag_jax.run.checkpoints import Checkpoints, load_arrays, save_arrays
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.training.guards import Guards
from r3rag_jax.training.rl_update import RLUpdate, StepInputs
from r3rag_jax.training.state import RLProgress, Targets, TrainState, shapes_of
from r3rag_jax.types import TrainBatch


class Recovery:
    """Acts on `guards.action` and `guards.nonfinite`."""

    def __init__(
        self,
        config: GuardsConfig,
        guards: Guards,
        checkpoints: Checkpoints,
        run: RunDirectory,
        mesh: Mesh,
        console: Console,
        start: Callable[[], tuple[TrainState, float]],
    ):
        """`start` makes the state and the weight of the KL that RL begins with, for a rollback without a checkpoint."""
        self._config, self._guards, self._checkpoints = config, guards, checkpoints
        self._run, self._mesh, self._console, self._start = run, mesh, console, start
        self._has_kept_inputs = False

    def check(self, progress: RLProgress, metrics: Mapping[str, float]) -> None:
        """Compare the metrics of the iteration just done with the guards' thresholds, and act if one is broken.

        Raises:
            UserError: RL ends here.
        """
        broken = self._guards.check(metrics)
        if not broken:
            return
        what = f"RL iteration {progress.iteration - 1}: {'; '.join(broken)}"
        if self._config.action == "stop":
            raise UserError(what)
        if self._config.action == "rollback":
            self._roll_back(progress, what)
        else:
            self._warn(what)

    def on_bad_step(
        self, progress: RLProgress, number: int, where: str, inputs: StepInputs, metrics: Mapping[str, Any]
    ) -> bool:
        """Act on an update whose loss or gradient was not finite; the inputs of the first one are kept on disk.

        Args:
            number: of the update in its iteration.
            where: its description.

        Returns:
            Whether to go on with the iteration's other updates.

        Raises:
            UserError: RL ends here.
        """
        what = (
            f"RL iteration {progress.iteration}, {where}: loss and gradient norm must be finite; got "
            f"{metrics['loss']} and {metrics['grad_norm']}"
        )
        if not self._has_kept_inputs:
            self._has_kept_inputs = True
            what += f"; kept for RLTrainer.replay: {self._keep(progress, number, inputs)}"
        if self._config.nonfinite == "stop":
            raise UserError(what)
        if self._config.nonfinite == "rollback":
            self._roll_back(progress, what)
            return False
        self._warn(f"{what}; skipped")
        return True

    def _keep(self, progress: RLProgress, number: int, inputs: StepInputs) -> Path:
        """Write the inputs of an update, and the state before it with `guards.save_state`."""
        name = f"{progress.iteration}_{number}"
        path = self._run.bad_step(name)
        gather = jax.jit(lambda tree: tree, out_shardings=replicated(self._mesh))
        save_arrays(path, gather(inputs))
        if self._config.save_state:
            kept = Checkpoints(self._run.bad_step_state(name))
            if kept.latest is None:
                kept.save(progress.iteration, progress.state, {"iteration": progress.iteration})
            kept.close()
        return path

    def _roll_back(self, progress: RLProgress, why: str) -> None:
        """Take state and weight of the KL from the last checkpoint, or from the start of RL.

        The iterations go on counting: with the same questions, sampling and updates would go wrong in the same way.
        """
        limit = self._config.rollbacks
        if self._guards.rollbacks >= limit:
            raise UserError(f"{why}; rolled back {limit} times before (guards.rollbacks)")
        self._guards.rollbacks += 1
        shapes, progress.state = shapes_of(progress.state), None  # frees its memory for the other one
        if self._checkpoints.latest is None:
            (progress.state, progress.kl), iteration = self._start(), 0
        else:
            progress.state, note = self._checkpoints.restore(shapes)
            progress.kl, iteration = note["kl"], note["iteration"]
        self._warn(f"{why}; back to the state before iteration {iteration}")

    def _warn(self, text: str) -> None:
        self._console.print(f"[yellow]{escape(text)}[/]", highlight=False)


def replay(path: Path, progress: RLProgress, update: RLUpdate, mesh: Mesh) -> dict[str, float]:
    """Repeat an update whose inputs were kept in `path`, from the state before it where that was kept; its metrics.

    The state of `progress` is used up: it must not be trained on.
    """
    if exists(path.with_suffix("")):
        kept = Checkpoints(path.with_suffix(""))
        progress.state, _ = kept.restore(shapes_of(progress.state))
        kept.close()
    with np.load(path, allow_pickle=False) as file:
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
    batch, targets = (device_put_batch(mesh, tree) for tree in (inputs.batch, inputs.targets))
    metrics = update.step(progress, dataclasses.replace(inputs, batch=batch, targets=targets))
    return {name: float(value) for name, value in metrics.items()}

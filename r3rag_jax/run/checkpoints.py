"""Checkpoints of a phase: the state on its shardings and a JSON note with everything else that resuming needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from r3rag_jax.errors import UserError


def save_arrays(path: Path, tree: Any) -> None:
    """One `.npz` of a pytree's arrays by their path in it; process 0 alone writes."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        arrays: Any = {jax.tree_util.keystr(key, simple=True, separator="."): np.asarray(x) for key, x in leaves}
        np.savez(path, **arrays)


def load_arrays(path: Path, like: Any) -> Any:
    """What `save_arrays` wrote, as numpy arrays in the structure of `like`, whose leaves are not looked at."""
    with np.load(path) as file:
        return jax.tree_util.tree_map_with_path(
            lambda key, _: file[jax.tree_util.keystr(key, simple=True, separator=".")], like
        )


class Checkpoints:
    """`<run>/checkpoints/<phase>/<step>/`. A save replaces the one before it only when it is complete."""

    def __init__(self, run_dir: Path, phase: str, *, keep: int = 1):
        self.directory = Path(run_dir).absolute() / "checkpoints" / phase
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest(self) -> int | None:
        """The newest complete step, None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, note: dict[str, Any]) -> None:
        """Write the state (a pytree of arrays) and the note (JSON)."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), note=ocp.args.JsonSave(note))
        self._manager.save(step, args=items, force=True)
        self._manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """(state, note) of a step, the newest by default, laid out as `like` (arrays, or shapes with shardings)."""
        step = self.latest if step is None else step
        if step is None:
            raise UserError(f"no checkpoint in {self.directory}")
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), note=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"checkpoint {self.directory / str(step)} does not fit this configuration: {error}"
            ) from error
        return restored["state"], restored["note"]

    def note(self) -> dict[str, Any] | None:
        """The newest note alone; None when there is no checkpoint."""
        if self.latest is None:
            return None
        return self._manager.restore(self.latest, args=ocp.args.Composite(note=ocp.args.JsonRestore()))["note"]

    def close(self) -> None:
        self._manager.close()

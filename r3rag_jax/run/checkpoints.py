"""Checkpoints of a phase: the training state with its shardings, and a JSON note with all else that resuming needs."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from r3rag_jax.errors import UserError
from r3rag_jax.parallel.processes import on_process_0
from r3rag_jax.run.files import open_atomic_binary


def save_arrays(path: Path, tree: Any) -> None:
    """Write the arrays of a pytree to one `.npz` file, named by their paths in the tree. Only process 0 writes.

    Every array must be fully addressable by process 0, e.g. replicated.
    """
    if jax.process_index() == 0:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        arrays: Any = {jax.tree_util.keystr(key, simple=True, separator="."): np.asarray(x) for key, x in leaves}
        with open_atomic_binary(path) as file:
            np.savez(file, **arrays)


def load_arrays(path: Path, like: Any) -> Any:
    """Read a file of `save_arrays` as a pytree of numpy arrays.

    Args:
        like: a pytree with the structure of the one that was saved; its leaves are ignored.
    """
    with np.load(path, allow_pickle=False) as file:
        return jax.tree_util.tree_map_with_path(
            lambda key, _: file[jax.tree_util.keystr(key, simple=True, separator=".")], like
        )


OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # as TensorStore writes them


class Checkpoints:
    """The checkpoints in a directory, one subdirectory `<step>/` each. A context manager that closes them.

    A checkpoint appears when it is complete; only then are older ones deleted. It is written by a thread, while
    training goes on.
    """

    def __init__(
        self,
        directory: epath.Path | Path,
        *,
        keep: int = 1,
        note: Mapping[str, Any] | None = None,
        before_save: Callable[[], object] = lambda: None,
        read_only: bool = False,
    ):
        """
        Args:
            directory: e.g. `<run>/checkpoints/rl`, local or on Google Cloud Storage; it is created.
            keep: how many checkpoints to keep.
            note: is added to the note of every checkpoint.
            before_save: called at the beginning of every save, to write what must not be older than the checkpoint.
            read_only: nothing is created or deleted, as of a run that another process may hold. Otherwise what a
                killed process has left of a checkpoint is deleted.
        """
        is_local = isinstance(directory, Path)
        self.directory = directory.absolute() if is_local else directory  # of a URL it would be below the working one
        self._note, self._before_save = dict(note or {}), before_save
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, cleanup_tmp_directories=not read_only
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        # Process 0 says which is the newest: a network file system may show the others an older listing.
        self._latest: int | None = on_process_0(self._manager.latest_step, "newest checkpoint")

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, which may still be under way; None where there is none."""
        return self._latest

    def save(self, step: int, state: Any, note: dict[str, Any]) -> None:
        """Begin to write a checkpoint; one that is under way is awaited first. All processes must call.

        The arrays are copied to the host before this returns: they may be donated.

        Args:
            step: number of updates or iterations done; must be larger than `latest`.
            state: a pytree of arrays.
            note: a JSON object.

        Raises:
            OSError: the checkpoint before could not be written.
        """
        self.wait()
        self._before_save()
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), note=ocp.args.JsonSave(note | self._note))
        with self._writing():
            self._manager.save(step, args=items, force=True)
        self._latest = step

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            OSError: it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Read the state and the note of a checkpoint. All processes must call.

        Args:
            like: a pytree of arrays, or of `jax.ShapeDtypeStruct` with shardings, that gives structure, shapes, dtypes
                and shardings of the result. The shardings, and the mesh, may differ from those that were saved.
            step: which checkpoint; the newest by default.

        Raises:
            UserError: there is no checkpoint, or its state has another structure or other shapes than `like`.
        """
        step = self.latest if step is None else step
        if step is None:
            raise UserError(f"no checkpoint in {self.directory}")
        self.wait()
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
        """The note of the newest checkpoint, read without its state; None where there is no checkpoint."""
        if self.latest is None:
            return None
        self.wait()
        return self._manager.restore(self.latest, args=ocp.args.Composite(note=ocp.args.JsonRestore()))["note"]

    def close(self) -> None:
        """Wait for the last checkpoint and release the resources of the checkpoint manager; the checkpoints stay.

        Raises:
            OSError: the last checkpoint could not be written.
        """
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """TensorStore reports errors of the operating system, such as a full disk, as text: make them OSErrors."""
        try:
            yield
        except ValueError as error:
            if (code := OS_ERROR.search(str(error))) is None:
                raise
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(self.directory)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

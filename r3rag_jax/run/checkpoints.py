"""Checkpoints of a phase: the training state with its shardings, and a JSON note with all else that resuming needs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from r3rag_jax.errors import UserError
from r3rag_jax.parallel.processes import on_process_0
from r3rag_jax.run.checksums import DamagedError, check_arrays, checksums, sealed, unsealed
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


SCORE = "score"  # its name among the metrics of a checkpoint
MAX_SHOWN = 300  # characters of an error of orbax
REMEDY = "remove it to go on from the one before, or, where there is none, from the beginning of the phase"


class _UnreadableError(UserError):
    """A checkpoint cannot be used."""


def _score_of(metrics: Any) -> float:
    return float(metrics[SCORE])


OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # as TensorStore writes them


class Checkpoints:
    """The checkpoints in a directory, one subdirectory `<step>/` each. A context manager that closes them.

    A checkpoint appears when it is complete; only then are older ones deleted. It is written by a thread, while
    training goes on. It holds checksums, which are compared when it is read (`checksums.py`).
    """

    def __init__(
        self,
        directory: epath.Path | Path,
        *,
        keep: int = 1,
        keep_best: int = 0,
        note: Mapping[str, Any] | None = None,
        before_save: Callable[[], object] = lambda: None,
        read_only: bool = False,
        say: Callable[[str], object] = lambda text: None,
    ):
        """
        Args:
            directory: e.g. `<run>/checkpoints/rl`, local or on Google Cloud Storage; it is created.
            keep: how many of the newest checkpoints to keep.
            keep_best: how many of those with the highest score are kept besides.
            note: is added to the note of every checkpoint.
            before_save: called at the beginning of every save, to write what must not be older than the checkpoint.
            read_only: nothing is created or deleted, as of a run that another process may hold. Otherwise what a
                killed process has left of a checkpoint is deleted.
            say: shows the user a sentence.
        """
        is_local = isinstance(directory, Path)
        self.directory = directory.absolute() if is_local else directory  # of a URL it would be below the working one
        self._note, self._before_save, self._is_read_only = dict(note or {}), before_save, read_only
        self._say = say
        kept = [LatestN(n=keep), BestN(get_metric_fn=_score_of, n=keep_best, keep_checkpoints_without_metrics=False)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept), best_fn=_score_of if keep_best else None,
            create=not read_only, cleanup_tmp_directories=not read_only,
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        # Process 0 says which is the newest: a network file system may show the others an older listing.
        self._latest: int | None = on_process_0(self._manager.latest_step, "newest checkpoint")

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, which may still be under way; None where there is none."""
        return self._latest

    def save(self, step: int, state: Any, note: dict[str, Any], *, score: float | None = None) -> None:
        """Begin to write a checkpoint; one that is under way is awaited first. All processes must call.

        The arrays are copied to the host before this returns: they may be donated.

        Args:
            step: number of updates or iterations done; must be larger than `latest`.
            state: a pytree of arrays.
            note: a JSON object.
            score: how good it is, for `keep_best`; None: not known.

        Raises:
            OSError: the checkpoint before could not be written.
            UserError: the disk has too little room; nothing was written.
        """
        self.wait()
        self._check_room(state)
        self._before_save()
        content = sealed(note | self._note, checksums(state))
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), note=ocp.args.JsonSave(content))
        metrics = None if score is None else {SCORE: score}
        with self._writing():
            self._manager.save(step, args=items, metrics=metrics, force=True)
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

        Where the newest is damaged, the one before is read, and so on; the user is told, and what is damaged is deleted
        once another one was read. With several processes only those faults are passed over that all of them see.

        Args:
            like: a pytree of arrays, or of `jax.ShapeDtypeStruct` with shardings, that gives structure, shapes, dtypes
                and shardings of the result. The shardings, and the mesh, may differ from those that were saved.
            step: which checkpoint; the newest that is whole by default.

        Raises:
            UserError: there is no checkpoint; or none that is whole and has the structure and the shapes of `like`.
        """
        steps = self._steps() if step is None else [step]
        if not steps:
            raise UserError(f"no checkpoint in {self.directory}")
        self.wait()
        faults: dict[int, UserError] = {}
        for step in steps:
            try:
                found = self._read(step, like)
            except _UnreadableError as error:
                if jax.process_count() > 1 and not isinstance(error.__cause__, DamagedError):
                    raise UserError(f"{error}; {REMEDY}") from error
                faults[step] = error
                continue
            for damaged, fault in faults.items():
                self._say(f"{fault}; it is deleted, and the checkpoint before, {step}, is taken")
                if not self._is_read_only:
                    self._manager.delete(damaged)
            self._latest = step
            return found
        first = next(iter(faults.values()))
        raise UserError(f"{first}; {REMEDY}") from first

    def note(self) -> dict[str, Any] | None:
        """The note of the newest checkpoint whose note is whole, read without its state; None where there is none."""
        self.wait()
        for step in self._steps():
            with contextlib.suppress(_UnreadableError):
                return self._read_note(step)[0]
        return None

    def _steps(self) -> list[int]:
        """The steps of all checkpoints, the newest first."""
        return on_process_0(lambda: sorted(self._manager.all_steps(), reverse=True), "checkpoints")

    def _read_note(self, step: int) -> tuple[dict[str, Any], dict[str, int]]:
        """The note of a checkpoint, and the checksums of its arrays."""
        with self._reading(step):
            content = self._manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore()))["note"]
            return unsealed(content)

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        note, arrays = self._read_note(step)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        with self._reading(step):
            items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
            state = self._manager.restore(step, args=items)["state"]
            check_arrays(state, arrays)
        return state, note

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Errors of files that are damaged are of every kind: make them one, which names the checkpoint."""
        try:
            yield
        except DamagedError as error:
            raise _UnreadableError(f"checkpoint {self.directory / str(step)} is damaged: {error}") from error
        except jax.errors.JaxRuntimeError:
            raise  # of the devices
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise _UnreadableError(
                f"checkpoint {self.directory / str(step)} does not fit this configuration, or is damaged: "
                f"{what[:MAX_SHOWN]}"
            ) from error

    def _check_room(self, state: Any) -> None:
        """Raise a UserError if the disk cannot hold one more checkpoint; a bucket is not asked."""
        if not isinstance(self.directory, Path):
            return
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        free = on_process_0(lambda: shutil.disk_usage(self.directory).free, "room for a checkpoint")
        if free < size:
            raise UserError(
                f"{self.directory} must have {size:,} bytes free for a checkpoint; got {free:,}: make room and start "
                "the same command again"
            )

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

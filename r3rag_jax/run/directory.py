"""The run directory: the paths of everything that a run leaves, and the check that a directory fits a configuration.

It is on a local or mounted disk, or in a bucket (`gs://…`); then the paths are those of the copy on this host, except
for checkpoints, see `store.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from r3rag_jax.config import Config, ConfigError, load_config, to_yaml
from r3rag_jax.config.resume import changed_keys
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.processes import barrier, on_process_0
from r3rag_jax.run.checkpoints import Checkpoints
from r3rag_jax.run.files import is_partial, write_text
from r3rag_jax.run.lease import Lease
from r3rag_jax.run.leftovers import remove_leftovers, report_lost_metrics
from r3rag_jax.run.lock import locked
from r3rag_jax.run.provenance import PROVENANCE, Provenance, check_order, check_provenance
from r3rag_jax.run.store import CHECKPOINTS, Store, is_remote

TOPOLOGY = "topology"  # its name in the note of a checkpoint
RL_TRAJECTORIES = "rl"  # name of the trajectories that RL keeps


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Names every path of a run; creates and reads none of them. `Path(run)` is the directory itself."""

    path: Path
    store: Store | None = None  # of a run in a bucket, of which `path` is the copy

    @classmethod
    def at(cls, place: str | os.PathLike[str]) -> RunDirectory:
        """The run directory at a path or a `gs://` URL, whose copy on this host is brought up to date.

        Raises:
            UserError: the bucket cannot be read, or holds something else there.
        """
        if isinstance(place, RunDirectory):
            return place
        place = os.fspath(place)
        if not is_remote(place):
            return cls(Path(place))
        store = Store(place)
        store.pull(discard=False)
        return cls(store.copy, store)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def place(self) -> str:
        """The path or the URL of the run, for messages."""
        return str(self.path) if self.store is None else self.store.url

    def shown(self, path: Path) -> str:
        """A file of the run as messages name it: where the user finds it."""
        return str(path) if self.store is None else self.store.path(path.relative_to(self.path).as_posix())

    def publish(self) -> None:
        """Upload what process 0 has written, where the run is in a bucket. Only process 0 writes.

        Raises:
            UserError: the bucket cannot be written.
        """
        if self.store is not None and jax.process_index() == 0:
            self.store.push()

    def share(self) -> None:
        """Show to all processes what process 0 has written. All processes must call, e.g. after a phase."""
        if self.store is None:
            return
        self.publish()
        barrier("run directory uploaded")
        if jax.process_index() != 0:
            self.store.pull(discard=True)
        barrier("run directory shared")

    @property
    def config_file(self) -> Path:
        """The resolved configuration (YAML)."""
        return self.path / "config.yaml"

    @property
    def lock(self) -> Path:
        """The file that a training run locks; see `locked`."""
        return self.path / ".lock"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per step; see `MetricsLog`."""
        return self.path / "metrics.jsonl"

    @property
    def phases_file(self) -> Path:
        """What the phases took (JSONL); see `phases.py`."""
        return self.path / "phases.jsonl"

    @property
    def report(self) -> Path:
        """The report page (HTML)."""
        return self.path / "report.html"

    @property
    def judgements(self) -> Path:
        """The judge's verdicts (JSONL), read again instead of asking twice."""
        return self.path / "judgements.jsonl"

    @property
    def digests(self) -> Path:
        """Digests of the files that the run reads (JSON); see `FileDigests`."""
        return self.path / "digests.json"

    @property
    def index(self) -> Path:
        """Directory of the retrieval index, where the configuration names no other."""
        return self.path / "index"

    @property
    def data_dir(self) -> Path:
        """Directory of the files that the index phase makes."""
        return self.path / "data"

    @property
    def evaluation_dir(self) -> Path:
        """Directory of all evaluations."""
        return self.path / "eval"

    @property
    def trajectory_dir(self) -> Path:
        """Directory of all trajectories."""
        return self.path / "trajectories"

    @property
    def stalls(self) -> Path:
        """Directory of the watchdog's reports; see `Watchdog`."""
        return self.path / "stalls"

    @property
    def profile(self) -> Path:
        """Directory of the JAX profile that `log.profile` asks for, read by TensorBoard or xprof."""
        return self.path / "profile"

    def data(self, split: str) -> Path:
        """The passages (`corpus`), the questions of a split, or the cold-start trajectories (`sft`), as JSONL."""
        return self.data_dir / f"{split}.jsonl"

    def checkpoints(self, phase: str) -> Path | epath.Path:
        """Directory of a phase's checkpoints; see `Checkpoints`."""
        return self._checkpoints / phase

    def bad_step(self, name: str) -> Path:
        """The arrays (`.npz`) of an update whose loss or gradient was not finite."""
        return self.path / "checkpoints" / f"bad_step_{name}.npz"

    def bad_step_state(self, name: str) -> Path | epath.Path:
        """Directory of the checkpoint with the state before such an update."""
        return self._checkpoints / f"bad_step_{name}"

    @property
    def _checkpoints(self) -> Path | epath.Path:
        return (self.path if self.store is None else epath.Path(self.store.url)) / CHECKPOINTS

    def policy(self, phase: str) -> Path:
        """The policy after a finished phase, a Hugging Face directory; it exists exactly when the phase is finished."""
        return self.path / "policy" / phase

    def evaluation(self, name: str) -> Path:
        """Metrics and fingerprint (JSON) of an evaluated system or question file."""
        return self.evaluation_dir / f"{name}.json"

    def evaluation_rows(self, name: str) -> Path:
        """The values of each question (JSONL) of which an evaluation's metrics are the means."""
        return self.evaluation_dir / f"{name}.questions.jsonl"

    def table(self, name: str, suffix: str) -> Path:
        """A table of `python -m r3rag_jax.evaluate table`, in one of its formats (suffix `json`, `md`, `tex`)."""
        return self.path / "tables" / f"{name}.{suffix}"

    def trajectories(self, name: str) -> Path:
        """Trajectories (JSONL) of an evaluation, or those that RL keeps (RL_TRAJECTORIES)."""
        return self.trajectory_dir / f"{name}.jsonl"


@contextlib.contextmanager
def hold_run(config: Config, run: RunDirectory | None = None, console: Console | None = None) -> Iterator[RunDirectory]:
    """As `open_run`, and no other process may hold the run until the block ends. All processes must call.

    Where the run is in a bucket, the copies on all hosts are made equal to it first, and process 0 uploads what it
    writes until the block ends, also by an exception.

    Args:
        run: the directory; by default that of the configuration.
        console: is told what is waited for.

    Raises:
        UserError: as `open_run`; or another process holds the run.
    """
    run = run or RunDirectory.at(config.run_directory)
    _check_run(config, run)
    with contextlib.ExitStack() as stack:
        if run.store is None:
            stack.enter_context(locked(run.lock))
        else:
            store, lease = run.store, Lease(run.store.filesystem, run.store.path(run.lock.name), console or Console())

            def begin() -> None:
                stack.enter_context(lease.held())
                store.pull(discard=True)

            on_process_0(begin, "lease of the run directory")
            if jax.process_index() != 0:
                store.pull(discard=True)
            else:
                stack.enter_context(store.uploading(lease.check))
            barrier("run directory pulled")
        opened = open_run(config, run)
        if jax.process_index() == 0:
            say = sentences_to(console or Console())
            remove_leftovers(run.path, run.index, say)
            report_lost_metrics(run.path, run.metrics_file, say)
        yield opened


def sentences_to(console: Console) -> Callable[[str], None]:
    """A function that prints a sentence as it is, whatever it holds and however long it is."""
    return functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)


def open_run(config: Config, run: RunDirectory | None = None) -> RunDirectory:
    """Create the run directory, or check that the run in it was made with this configuration. All processes must call.

    Settings that do not change what a run computes may differ; the configuration file then takes the new ones.

    Raises:
        UserError: the directory holds a run with other settings or with a configuration that cannot be read, RL that
            did not begin from the cold start that is to be trained, or something else than a run. Nothing is written.
    """
    run = run or RunDirectory.at(config.run_directory)
    _check_run(config, run)
    if jax.process_index() == 0:
        write_text(run.config_file, to_yaml(config))
    run.share()
    barrier("run directory")
    return run


def open_checkpoints(
    run: RunDirectory,
    phase: str,
    provenance: Provenance,
    *,
    keep: int,
    keep_best: int = 0,
    mesh: Mesh,
    console: Console,
) -> Checkpoints:
    """The checkpoints of a phase, which record its provenance and topology. All processes must call.

    Args:
        keep, keep_best: how many are kept; see `Checkpoints`.
        mesh: what the phase trains on now. On another mesh than before, the user is told that numbers differ by
            rounding: sums are taken in another order.
        console: is told that the mesh is another one, or that a checkpoint is damaged.

    Raises:
        UserError: the phase began from something else.
    """
    topology = {"processes": jax.process_count(), "mesh": dict(mesh.shape)}
    note = {PROVENANCE: dict(provenance), TOPOLOGY: topology}
    say = sentences_to(console)
    checkpoints = Checkpoints(
        run.checkpoints(phase), keep=keep, keep_best=keep_best, note=note, before_save=run.publish, say=say
    )
    recorded = checkpoints.note() or {}
    check_provenance(phase, checkpoints.directory, recorded.get(PROVENANCE, {}), provenance)
    before = recorded.get(TOPOLOGY, topology)
    if before != topology:
        say(
            f"{phase} resumes on another mesh ({_topology_words(before)} before, {_topology_words(topology)} now): "
            "numbers are equal within rounding"
        )
    return checkpoints


def _topology_words(topology: dict[str, Any]) -> str:
    axes = " ".join(f"{name}={size}" for name, size in topology["mesh"].items())
    return f"{axes}, processes={topology['processes']}"


def _check_run(config: Config, run: RunDirectory) -> None:
    on_process_0(lambda: _check_files(config, run), "run directory")
    check_order(config.phases, run.policy("sft"), run.policy("rl"), run.checkpoints("rl"))


def _check_files(config: Config, run: RunDirectory) -> None:
    if run.config_file.exists():
        try:
            changed = changed_keys(load_config(run.config_file), config)
        except ConfigError as error:
            raise UserError(
                f"{run.place} holds a run with a configuration that cannot be read: {error}; "
                "choose another name=… or remove the directory"
            ) from None
        if changed:
            name, (old, new) = next(iter(changed.items()))
            raise UserError(
                f"{run.place} holds a run with other settings ({name} was {old!r}, now {new!r}): "
                "choose another name=… or remove the directory"
            )
    elif run.path.exists() and not run.path.is_dir():
        raise UserError(f"run_dir must be a directory, or a new one; {run.place} is a file")
    elif run.path.exists() and not all(path == run.lock or is_partial(path) for path in run.path.iterdir()):
        raise UserError(f"{run.place} is not empty and holds no run: choose another name=… or run_dir=…")

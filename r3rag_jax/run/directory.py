"""The run directory: the paths of everything that a run leaves, and the check that a directory fits a configuration."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from r3rag_jax.config import Config, ConfigError, load_config, to_yaml
from r3rag_jax.config.resume import changed_keys
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.processes import barrier
from r3rag_jax.run.checkpoints import Checkpoints
from r3rag_jax.run.files import is_partial, write_text
from r3rag_jax.run.lock import locked
from r3rag_jax.run.provenance import PROVENANCE, Provenance, check_order, check_provenance

TOPOLOGY = "topology"  # its name in the note of a checkpoint
RL_TRAJECTORIES = "rl"  # name of the trajectories that RL keeps


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Names every path of a run; creates and reads none of them. `Path(run)` is the directory itself."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

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

    def data(self, split: str) -> Path:
        """The passages (`corpus`), the questions of a split, or the cold-start trajectories (`sft`), as JSONL."""
        return self.data_dir / f"{split}.jsonl"

    def checkpoints(self, phase: str) -> Path:
        """Directory of a phase's checkpoints; see `Checkpoints`."""
        return self.path / "checkpoints" / phase

    def bad_step(self, name: str) -> Path:
        """The arrays (`.npz`) of an update whose loss or gradient was not finite."""
        return self.path / "checkpoints" / f"bad_step_{name}.npz"

    def policy(self, phase: str) -> Path:
        """The policy after a finished phase, a Hugging Face directory; it exists exactly when the phase is finished."""
        return self.path / "policy" / phase

    def evaluation(self, name: str) -> Path:
        """Metrics and fingerprint (JSON) of an evaluated system or question file."""
        return self.evaluation_dir / f"{name}.json"

    def trajectories(self, name: str) -> Path:
        """Trajectories (JSONL) of an evaluation, or those that RL keeps (RL_TRAJECTORIES)."""
        return self.trajectory_dir / f"{name}.jsonl"


@contextlib.contextmanager
def hold_run(config: Config) -> Iterator[RunDirectory]:
    """As `open_run`, and no other process may hold the run until the block ends. All processes must call.

    Raises:
        UserError: as `open_run`; or another process holds the run.
    """
    with locked(_check_run(config).lock):
        yield open_run(config)


def open_run(config: Config) -> RunDirectory:
    """Create the run directory, or check that the run in it was made with this configuration. All processes must call.

    Settings that do not change what a run computes may differ; the configuration file then takes the new ones.

    Raises:
        UserError: the directory holds a run with other settings or with a configuration that cannot be read, RL that
            did not begin from the cold start that is to be trained, or something else than a run. Nothing is written.
    """
    run = _check_run(config)
    barrier("run directory checked")  # process 0 must not write what the other processes are still checking
    if jax.process_index() == 0:
        write_text(run.config_file, to_yaml(config))
    barrier("run directory")
    return run


def open_checkpoints(
    run: RunDirectory, phase: str, provenance: Provenance, *, keep: int, mesh: Mesh, say: Callable[[str], object]
) -> Checkpoints:
    """The checkpoints of a phase, which record its provenance and topology. All processes must call.

    Args:
        keep: how many are kept.
        mesh: what the phase trains on now. On another mesh than before, the user is told that numbers differ by
            rounding: sums are taken in another order.
        say: shows a sentence to the user.

    Raises:
        UserError: the phase began from something else.
    """
    topology = {"processes": jax.process_count(), "mesh": dict(mesh.shape)}
    note = {PROVENANCE: dict(provenance), TOPOLOGY: topology}
    checkpoints = Checkpoints(run.checkpoints(phase), keep=keep, note=note)
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


def _check_run(config: Config) -> RunDirectory:
    run = RunDirectory(config.run_directory)
    if run.config_file.exists():
        try:
            changed = changed_keys(load_config(run.config_file), config)
        except ConfigError as error:
            raise UserError(
                f"{run.path} holds a run with a configuration that cannot be read: {error}; "
                "choose another name=… or remove the directory"
            ) from None
        if changed:
            name, (old, new) = next(iter(changed.items()))
            raise UserError(
                f"{run.path} holds a run with other settings ({name} was {old!r}, now {new!r}): "
                "choose another name=… or remove the directory"
            )
    elif run.path.exists() and not all(path == run.lock or is_partial(path) for path in run.path.iterdir()):
        raise UserError(f"{run.path} is not empty and holds no run: choose another name=… or run_dir=…")
    check_order(config.phases, run.policy("sft"), run.policy("rl"), run.checkpoints("rl"))
    return run

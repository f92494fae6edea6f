"""The contract of experiment trackers, and the import of their optional packages."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from r3rag_jax.errors import UserError


class Tracker(Protocol):
    """Receives the metrics of one run; `metrics.jsonl` remains the record that everything else reads.

    Only process 0 calls a tracker. The constructor imports the tracker's package and writes nothing: files are opened
    by the first call that has something to write. A resumed run repeats the steps after its last checkpoint, so a
    tracker may receive a step twice.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Args: `run_dir`, whose last component is the run's name; `config`, the resolved configuration.

        Raises:
            UserError: the tracker's package is not installed, or the tracker refuses the run's name.
        """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step under names such as `rl/reward`. Values may be NaN or infinite."""

    def trajectories(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record trajectories of a step, each a JSON object with at least the keys of `trajectory_to_dict`."""

    def finish(self) -> None:
        """Write what is still buffered and close the files. Nothing may be recorded afterwards."""


def import_extra(package: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        package: name of the module.
        extra: the extra of r3rag_jax that installs the package; also the tracker's name in `log.trackers`.

    Raises:
        UserError: the package, or one that it needs, is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"log.trackers={extra} needs the package {package} ({error}): pip install 'r3rag_jax[{extra}]'"
        ) from error

"""The table of trackers: a new one is a file beside this one and a line in `TRACKERS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r3rag_jax.errors import UserError
from r3rag_jax.run.trackers.base import Tracker
from r3rag_jax.run.trackers.tensorboard import TensorBoardTracker
from r3rag_jax.run.trackers.trackio import TrackioTracker
from r3rag_jax.run.trackers.wandb import WandbTracker

TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
}


def make_trackers(names: Sequence[str], run_dir: Path, config: Mapping[str, Any]) -> tuple[Tracker, ...]:
    """The trackers that `log.trackers` names.

    Args:
        names: keys of `TRACKERS`.
        run_dir: the run's directory; nothing is written to it before the first metric.
        config: the resolved configuration as nested dicts.

    Raises:
        UserError: a name is unknown or comes twice, or the package of a tracker is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"log.trackers must be among {', '.join(TRACKERS)}; got {name!r}")
    if len(set(names)) != len(names):
        raise UserError(f"log.trackers must name nothing twice; got {', '.join(names)}")
    return tuple(TRACKERS[name](run_dir, config) for name in names)

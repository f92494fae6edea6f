"""The TensorBoard tracker: event files in `<run>/tensorboard/`, read by `tensorboard --logdir runs`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r3rag_jax.run.trackers.base import import_extra

FLUSH_S = 10  # a killed process loses at most the events of these seconds


class TensorBoardTracker:
    """Writes scalars, and trajectories and configuration as JSON texts, through the package tensorboardX.

    TensorBoard keeps scalars in float32.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._package = import_extra("tensorboardX", "tensorboard")
        self._directory = run_dir / "tensorboard"
        self._config = config

    @functools.cached_property
    def _writer(self) -> Any:
        writer = self._package.SummaryWriter(str(self._directory), flush_secs=FLUSH_S)
        writer.add_text("config", json_block(self._config), 0)
        return writer

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def trajectories(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._writer.add_text("trajectories", "\n\n".join(json_block(row) for row in rows), step)

    def finish(self) -> None:
        if "_writer" in vars(self):
            self._writer.close()


def json_block(value: Mapping[str, Any]) -> str:
    """A JSON object as a Markdown code block, the format of TensorBoard's text panel."""
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False, default=str)}\n```"

"""The TensorBoard tracker: event files in `<run>/tensorboard/`, read by `tensorboard --logdir runs`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r3rag_jax.run.trackers.base import import_extra
from r3rag_jax.run.trackers.tables import COLUMNS, table_row

MARKUP = "\\`*_{}[]()<>#+!|&~"  # characters that Markdown or HTML would read
FLUSH_S = 10  # a killed process loses at most the events of these seconds


class TensorBoardTracker:
    """Writes scalars, trajectories as tables and the configuration as JSON, through the package tensorboardX.

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
        self._writer.add_text("trajectories", markdown_table(rows), step)

    def finish(self) -> None:
        if "_writer" in vars(self):
            self._writer.close()


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Trajectories as a Markdown table, which TensorBoard's text panel renders. All text is shown as it is."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([_cell(str(cell)) for cell in table_row(row)] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    text = "".join(f"&#{ord(c)};" if c in MARKUP else c for c in text)
    return " ".join(text.replace("\n", "<br>").split())


def json_block(value: Mapping[str, Any]) -> str:
    """A JSON object as a Markdown code block, the format of TensorBoard's text panel."""
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False, default=str)}\n```"

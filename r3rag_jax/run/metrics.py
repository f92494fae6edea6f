"""What a run tells while it works: `metrics.jsonl` always, a live progress line in a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.monitoring


class MetricsLog:
    """Appends one JSON object a step; process 0 alone writes.

    A resumed phase first drops the lines behind the checkpoint it resumes from, so that every step stands once.
    """

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / "metrics.jsonl"
        self._started = time.monotonic()

    def write(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        if jax.process_index() != 0:
            return
        time_s = round(time.monotonic() - self._started, 3)
        values = {name: float(value) for name, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"phase": phase, "step": step, "time_s": time_s, **values}) + "\n")

    def rewind(self, phase: str, step: int) -> None:
        """Forget what was written of a phase at or after `step`."""
        if jax.process_index() != 0 or not self.path.exists():
            return
        lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
        keep = [line for line in lines if (r := json.loads(line))["phase"] != phase or r["step"] < step]
        self.path.write_text("".join(f"{line}\n" for line in keep))

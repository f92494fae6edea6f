"""What a run tells while it works: `metrics.jsonl` always, a live progress line in a terminal."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

COMPILED = "/jax/core/compile/backend_compile_duration"  # what JAX tells its listeners at every compilation


def num_compiled() -> int:
    """Programs that were compiled, or read from the compile cache, in this process since the first call of this."""
    return len(_compiled())


@functools.cache
def _compiled() -> list[str]:
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return events


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


class Bar:
    """A progress bar with live numbers; plain lines every tenth of the way where there is no terminal."""

    def __init__(self, title: str, total: int, *, console: Console, live: bool, done: int = 0):
        self._console, self._title, self._total, self._done = console, title, total, done
        self._shown = -1
        is_silent = jax.process_index() != 0
        self._progress = None
        if live and console.is_terminal and not is_silent:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
            )  # fmt: skip
            self._task = self._progress.add_task(title, total=total, completed=done, note="")
        self._is_silent = is_silent

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, count: int = 1, /, **numbers: float) -> None:
        """Move on by `count` and show the numbers, e.g. reward=1.2, em=61.0, tokens_per_s=5400."""
        self._done += count
        note = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done, note=note or None)
        elif not self._is_silent and (tenth := 10 * self._done // max(1, self._total)) > self._shown:
            self._shown = tenth
            self._console.print(f"{self._title} {self._done}/{self._total}  {note}", highlight=False)

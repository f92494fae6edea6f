"""A live progress bar, and the count of compiled programs."""

from __future__ import annotations

import functools

import jax
import jax.monitoring
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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


COMPILED = "/jax/core/compile/backend_compile_duration"  # what JAX tells its listeners at every compilation

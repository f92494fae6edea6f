"""A live progress bar, and the count of compiled programs."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.monitoring
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from r3rag_jax.run.watchdog import moved

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # JAX reports it after every compilation


class ProgressBar:
    """A progress bar with live numbers and lines below it; without a terminal, text after every tenth of the work.

    Processes other than 0 show nothing.
    """

    def __init__(self, title: str, total: int, *, console: Console, live: bool, done: int = 0):
        """Args: `total` units of work, of which `done` are already done; `live=False` for lines in a terminal too."""
        self._console, self._title, self._total, self._done = console, title, total, done
        self._last_tenth = -1
        self._below: Sequence[str] = ()
        self._is_silent = jax.process_index() != 0
        self._progress = None
        if live and console.is_terminal and not self._is_silent:
            self._progress = Progress(
                TextColumn("{task.description}", style="bold", markup=False), BarColumn(),
                TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self._live = Live(self._progress, console=console)
            self._task = self._progress.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> ProgressBar:
        moved(f"{self._title} {self._done}/{self._total}")
        if self._progress is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._live.stop()

    def show_below(self, lines: Sequence[str]) -> None:
        """Show lines below the bar from the next `advance` on."""
        self._below = lines

    def advance(self, count: int = 1, /, **numbers: float) -> None:
        """Add `count` units of work and show the numbers, e.g. reward=1.2, em=61.0, tokens_per_s=5400."""
        self._done += count
        moved(f"{self._title} {self._done}/{self._total}")
        note = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done, note=note or None)
            self._live.update(Group(self._progress, *(Text(line, "dim") for line in self._below)), refresh=True)
        elif not self._is_silent and (tenth := 10 * self._done // max(1, self._total)) > self._last_tenth:
            self._last_tenth = tenth
            line = f"{self._title} {self._done}/{self._total}  {note}"  # the title may name a file: no markup
            for shown in (line, *(f"  {detail}" for detail in self._below)):
                self._console.print(shown, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def bar_of_unknown_length(title: str, *, console: Console, live: bool) -> Iterator[Callable[..., None]]:
    """Yield a function of (units newly done, units in all, stage=""), whose first call opens a progress bar.

    Another stage opens another bar. From the second call of a stage on the bar shows the rate since the first, which
    may have compiled programs or found work that was done before, and the seconds that remain.
    """
    with contextlib.ExitStack() as stack:
        bar, shown, done, began = None, None, 0, (0, 0.0)

        def advance(count: int, total: int, stage: str = "") -> None:
            nonlocal bar, shown, done, began
            if bar is None or stage != shown:
                stack.close()
                name = f"{title} {stage}".rstrip()
                bar = stack.enter_context(ProgressBar(name, total, console=console, live=live))
                shown, done, began = stage, count, (count, time.monotonic())
                bar.advance(count)
                return
            done += count
            rate = (done - began[0]) / max(time.monotonic() - began[1], 1e-9)
            bar.advance(count, per_s=rate, left_s=(total - done) / rate)

        yield advance


def num_compiled() -> int:
    """How many programs this process has compiled, or read from the compile cache, since the first call."""
    return len(_compile_events())


@functools.cache
def _compile_events() -> list[str]:
    """The compile events so far: the first call registers a listener that appends to this list."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return events

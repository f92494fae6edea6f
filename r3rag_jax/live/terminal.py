"""Shows a question in a terminal while it is answered: a step as it is written, then its passages, then the outcome."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from r3rag_jax.reporting.terminal import (
    add_number,
    add_outcome,
    add_part,
    add_passages,
    add_question,
    add_step,
    legend,
    new_grid,
)
from r3rag_jax.rollout.events import (
    Cancelled,
    Ended,
    Event,
    Failed,
    PassagesFound,
    SearchStarted,
    StepText,
    StepWritten,
    Waiting,
)
from r3rag_jax.types import Question

PARTS = ("malformed", "analysis", "query", "answer")


class QuestionView:
    """Prints the events of one question; what is not finished is redrawn in place, where the console can do that."""

    def __init__(self, console: Console, question: Question):
        self._console, self._question = console, question
        self._parts: dict[str, str] = {}  # of the step that is being written
        self._live: Live | None = None
        self._print(add_question, question.question)

    def hear(self, event: Event) -> None:
        """Show an event; the last one prints how the question has ended."""
        match event:
            case Waiting(num_ahead):
                self._draw(Text(f"  waiting for {num_ahead + 1} others", "dim"))
            case StepText(number, part, text):
                self._parts[part] = self._parts.get(part, "") + text
                self._draw(self._unfinished(number))
            case StepWritten(number, step):
                self._parts = {}
                self._print(add_number, number)
                self._print(add_step, step)
            case SearchStarted():
                self._draw(Text("  searching …", "dim"))
            case PassagesFound(_, passages, scores):
                found = {passage.id: score for passage, score in zip(passages, scores, strict=True)}
                self._print(add_passages, passages, self._question.supporting_ids, found)
            case Ended(trajectory):
                self._console.print()
                self._print(add_outcome, trajectory)
                self._console.print(Text("\n").append_text(legend()))
            case Failed() | Cancelled():
                self.close()

    def close(self) -> None:
        """Remove what is not finished."""
        if self._live is not None:
            self._live.update(Text(), refresh=True)  # `stop` shows all of it once more, however long
            self._live.stop()
            self._live = None

    def _unfinished(self, number: int) -> Table:
        grid = new_grid()
        add_number(grid, number)
        for part in PARTS:
            if text := self._parts.get(part):
                add_part(grid, part, text)
        return grid

    def _draw(self, shown: Table | Text) -> None:
        if not self._console.is_terminal:
            return
        if self._live is None:
            self._live = Live(console=self._console, transient=True, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
        self._live.update(shown, refresh=True)

    def _print(self, add: Callable[..., None], *args: Any) -> None:
        self.close()
        grid = new_grid()
        add(grid, *args)
        self._console.print(grid)

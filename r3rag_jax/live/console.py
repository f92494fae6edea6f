"""Questions of a command line: one, those of a pipe, or those that are typed one after another."""

from __future__ import annotations

import dataclasses
import json
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console

from r3rag_jax.errors import UserError
from r3rag_jax.live.player import Player, Settings
from r3rag_jax.live.rows import LAST_ROWS, RowMaker
from r3rag_jax.live.terminal import QuestionView
from r3rag_jax.rollout.events import LAST, Event, Failed
from r3rag_jax.rollout.live_scheduler import AskedQuestion
from r3rag_jax.types import Question

PROMPT = "question: "


@dataclasses.dataclass(frozen=True)
class _Playing:
    """A question that has been asked, and where its events come."""

    question: Question
    asked: AskedQuestion
    events: queue.SimpleQueue[Event]

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self.events.get()
            yield event
            if isinstance(event, LAST):
                return


class ConsoleAsker:
    """Asks questions with one player and the same settings, and prints what happens, or a line of JSON each."""

    def __init__(self, player: Player, console: Console, *, as_json: bool, settings: Settings | None = None):
        """`settings`: the player's by default."""
        self._player, self._console, self._as_json = player, console, as_json
        self._settings = settings or player.defaults

    def ask(self, question: Question) -> None:
        """Ask one question.

        Raises:
            UserError: it does not fit the context, or cannot be finished.
        """
        self._show(self._start(question))

    def ask_typed(self) -> None:
        """Ask what is typed, until the end of input; Ctrl-C stops a question, and the command between two of them."""
        while True:
            try:
                print(PROMPT, end="", file=sys.stderr, flush=True)  # stdout is for answers
                text = input()
            except EOFError:
                return
            self._try(lambda text=text: self._show_or_stop(self._start(self._player.question(text))), [])  # type: ignore[misc]

    def ask_lines(self, lines: Iterable[str]) -> int:
        """Ask each line that is not empty; as many as there are slots are played at the same time.

        Returns the number of questions that could not be finished, of which each has a line on stderr.
        """
        waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(lines, waiting), daemon=True).start()
        playing: deque[_Playing] = deque()
        failed: list[str] = []
        has_more = True
        while has_more or playing:
            while has_more and len(playing) < self._player.scheduler.num_slots and not (playing and waiting.empty()):
                text = waiting.get()
                has_more = text is not None
                if text is not None:
                    self._try(lambda text=text: playing.append(self._start(self._player.question(text))), failed)  # type: ignore[misc]
            if playing:
                self._try(lambda: self._show(playing.popleft()), failed)
        return len(failed)

    def _try(self, do: Callable[[], object], failed: list[str]) -> None:
        try:
            do()
        except UserError as error:
            failed.append(str(error))
            print(f"error: {error}", file=sys.stderr)

    def _start(self, question: Question) -> _Playing:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        return _Playing(question, self._player.ask(question, self._settings, events.put), events)

    def _show_or_stop(self, playing: _Playing) -> None:
        try:
            self._show(playing)
        except KeyboardInterrupt:
            playing.asked.cancel()
            self._console.print("stopped", style="dim")

    def _show(self, playing: _Playing) -> None:
        """Print the events of a question until it is finished."""
        if self._as_json:
            return self._show_json(playing)
        view = QuestionView(self._console, playing.question)
        try:
            for event in playing:
                view.hear(event)
                _check(event)
        finally:
            view.close()
        return None

    def _show_json(self, playing: _Playing) -> None:
        maker = RowMaker(playing.question, self._settings)
        for event in playing:
            _check(event)
            row = maker.row(event)
            if row.event in LAST_ROWS:
                print(json.dumps(row.model_dump().get("result"), ensure_ascii=False), flush=True)


def _read(lines: Iterable[str], into: queue.SimpleQueue[str | None]) -> None:
    for line in lines:
        if line.strip():
            into.put(line.strip())
    into.put(None)


def _check(event: Event) -> None:
    if isinstance(event, Failed):
        raise UserError(event.reason)

"""The journal of a cold start: every reply of the teacher and every finished attempt, on disk before it is used.

JSON Lines, of which a killed process leaves all but perhaps the last one whole:

    {"kind": "journal", "facts": {…}}                       first: what the attempts depend on
    {"kind": "reply", "key": "…", "text": "…", "is_whole": true, "input_tokens": 812, "output_tokens": 61}
    {"kind": "attempt", "temperature": 0.4, "id": "…", "question": "…", …}   a trajectory as `trajectory_to_dict`
    {"kind": "failure", "key": "…", "reason": "…"}          a request without a reply, which is made again

A row is written by one thread at a time and flushed to the disk (fsync) before the call returns. What is known from the
journal is never asked again: an attempt that was under way is played again from its replies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from r3rag_jax.data.fields import FieldError, Row, get_field
from r3rag_jax.data.trajectories import trajectory_from_dict, trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.run.lock import locked
from r3rag_jax.types import Trajectory

T = TypeVar("T")
Facts = dict[str, Any]  # JSON values by name
Span = tuple[int, int]  # the first byte of a line, and its length


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the teacher wrote for one step.

    Fields:
        is_whole: False where the token budget cut it off.
        input_tokens, output_tokens: as the server counts them; None where it does not say.
    """

    text: str
    is_whole: bool = True
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One finished attempt at a question."""

    trajectory: Trajectory
    temperature: float

    @classmethod
    def of(cls, trajectory: Trajectory, temperature: float) -> Attempt:
        """An attempt as a journal keeps it: without samples and counts of tokens, which are those of a backend."""
        question, steps, status = trajectory.question, trajectory.steps, trajectory.status
        return cls(Trajectory(question, steps, status, sample_index=trajectory.sample_index), temperature)


class Journal:
    """A journal that is open for appending; its methods may be called from many threads."""

    def __init__(self, path: Path, file: FileIO):
        """Read the journal, whose lock the caller holds; see `open_journal`."""
        self.path, self._file, self._lock = path, file, threading.Lock()
        self._replies: dict[str, Span] = {}  # by key
        self._attempts: list[Span] = []
        self.facts: Facts | None = None  # None: the journal is new
        self.num_replies = self.num_uncounted = 0  # all replies, and those of which the server did not count the tokens
        self.input_tokens = self.output_tokens = 0  # of all replies
        self.torn = ""  # says which half line a killed process has left; it is removed
        self._end = 0  # bytes of whole lines
        self._read()

    # ---- reading

    def reply(self, key: str) -> Reply | None:
        """The reply with this key, if there is one."""
        with self._lock:
            span = self._replies.get(key)
        return None if span is None else self._parsed(span, _reply_of)

    def attempts(self) -> Iterator[Attempt]:
        """Yield the finished attempts, one in memory at a time."""
        for span in list(self._attempts):
            yield self._parsed(span, _attempt_of)

    def _parsed(self, span: Span, parse: Callable[[Row], T]) -> T:
        start, length = span
        try:
            return parse(json.loads(os.pread(self._file.fileno(), length, start)))
        except (FieldError, ValueError) as error:
            raise UserError(f"{self.path}: the row at byte {start} cannot be read: {error}") from None

    def _read(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                row = _parse(line)
                if row is None and not line.endswith(b"\n"):
                    self.torn = f"{self.path}:{number}: left out, half a line of a process that was killed"
                    break
                if row is None or (row["kind"] == "journal") != (number == 1):
                    raise UserError(
                        f"{self.path}:{number}: expected {'the first' if number == 1 else 'a further'} row of a "
                        f"journal; got {line[:80]!r}"
                    )
                self._note(row, (self._end, len(line)))
                self._end += len(line)
        self._file.truncate(self._end)
        if self._end and os.pread(self._file.fileno(), 1, self._end - 1) != b"\n":  # only the line end is missing
            self._write(b"\n")

    def _note(self, row: Row, span: Span) -> None:
        """Take up a row that is in the file."""
        if row["kind"] == "journal":
            self.facts = row.get("facts")
        elif row["kind"] == "attempt":
            self._attempts.append(span)
        elif row["kind"] == "reply" and row.get("key") not in self._replies:
            self._replies[row["key"]] = span
            self.num_replies += 1
            counts = row.get("input_tokens"), row.get("output_tokens")
            self.num_uncounted += None in counts
            self.input_tokens += counts[0] or 0
            self.output_tokens += counts[1] or 0

    # ---- writing

    def add_facts(self, facts: Facts) -> None:
        """Begin a new journal with what its attempts depend on.

        Raises:
            UserError: the journal was begun with others.
        """
        facts = json.loads(json.dumps(facts))
        if self.facts is None:
            self._append({"kind": "journal", "facts": facts})
            return
        names = [name for name in {**self.facts, **facts} if self.facts.get(name) != facts.get(name)]
        if names:
            was, now = (json.dumps(found.get(names[0])) for found in (self.facts, facts))
            raise UserError(
                f"{self.path} was begun with other settings ({names[0]} was {was}, now {now}): "
                "restore them, or choose another coldstart.dir=…"
            )

    def add_reply(self, key: str, reply: Reply) -> None:
        """Keep a reply of the teacher."""
        self._append({"kind": "reply", "key": key, **dataclasses.asdict(reply)})

    def add_attempt(self, attempt: Attempt) -> None:
        """Keep a finished attempt."""
        row = {"kind": "attempt", "temperature": attempt.temperature, **trajectory_to_dict(attempt.trajectory)}
        self._append(row)

    def add_failure(self, key: str, reason: str) -> None:
        """Record that a request has failed."""
        self._append({"kind": "failure", "key": key, "reason": reason})

    def _append(self, row: Row) -> None:
        """Write a row and wait until it is on the disk. A row that cannot be written whole is not there at all."""
        line = json.dumps(row).encode() + b"\n"
        with self._lock:
            try:
                self._write(line)
            except OSError as error:
                with contextlib.suppress(OSError):  # else the next process removes it
                    self._file.truncate(self._end)
                error.filename = error.filename or str(self.path)
                raise
            self._note(row, (self._end - len(line), len(line)))

    def _write(self, content: bytes) -> None:
        """Append bytes, flush them, and only then count them."""
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) or 0 :]
        os.fsync(self._file.fileno())
        self._end += len(content)


@contextlib.contextmanager
def open_journal(path: Path, say: Callable[[str], None]) -> Iterator[Journal]:
    """Open a journal, new or old, which no other process may write until the block ends.

    Args:
        say: is told of the half line that a killed process has left.

    Raises:
        UserError: another process has it, it cannot be opened, or a line is damaged (the error names it).
    """
    with locked(path.with_name(".lock")), contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("a+b", buffering=0))
        except OSError as error:
            raise UserError(f"{path} cannot be opened: {error.strerror}") from None
        journal = Journal(path, file)
        if journal.torn:
            say(journal.torn)
        yield journal


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None where it is none, or has no kind."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("kind"), str) else None


def _reply_of(row: Row) -> Reply:
    return Reply(
        text=get_field(row, "text", str),
        is_whole=get_field(row, "is_whole", bool),
        input_tokens=get_field(row, "input_tokens", int, default=None),
        output_tokens=get_field(row, "output_tokens", int, default=None),
    )


def _attempt_of(row: Row) -> Attempt:
    if not isinstance(temperature := row.get("temperature"), float):
        raise FieldError(f"temperature must be a number with a point; got {temperature!r}")
    return Attempt(trajectory_from_dict(row), temperature)

"""The records of a file with their lines, and what a record that breaks a rule does (`data.on_error`)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console

from r3rag_jax.config import DataConfig
from r3rag_jax.errors import UserError, shortened

T = TypeVar("T")
S = TypeVar("S")
MAX_NAMED = 10  # faults that a message names; the others are counted
MAX_FAULT = 500  # characters of a fault


class Records(Sequence[T]):
    """What was read from a file, in its order; each item has a line, so that a later check can name it.

    The items are in memory; or they are read from `stored` whenever they are asked for, and so are those of the records
    that `map` and `take` make of them.
    """

    def __init__(self, path: str | Path, rows: Iterable[tuple[int, T]] = ()) -> None:
        """`rows`: (line number from 1, item)."""
        rows = list(rows)
        self.path, self.lines = path, [number for number, _ in rows]
        self._items: Sequence[T] = [item for _, item in rows]
        self.is_stored = False
        self._ids: list[str] | None = None

    @classmethod
    def stored(
        cls, path: str | Path, lines: Iterable[int], items: Sequence[T], ids: list[str] | None = None
    ) -> Records[T]:
        """Records that stay where they are.

        Args:
            items: gives random access to them, and may be read by several threads.
            ids: of the items, if these are questions; None: they are read from the items.
        """
        records = cls(path)
        records.lines, records._items, records.is_stored, records._ids = list(lines), items, True, ids
        return records

    @property
    def ids(self) -> list[str]:
        """The ids of the items, which must be questions."""
        return [item.id for item in self._items] if self._ids is None else self._ids  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._items[i] for i in range(len(self))[index]]
        return self._items[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def __repr__(self) -> str:
        return f"Records({str(self.path)!r}, {len(self)} items)"

    def place(self, index: int) -> str:
        """`file:line` of an item."""
        return f"{self.path}:{self.lines[index]}"

    def map(self, function: Callable[[T], S]) -> Records[S]:
        """What a function makes of the items, at their lines."""
        if self.is_stored:
            return Records.stored(self.path, self.lines, Mapped(self._items, function))
        return Records(self.path, zip(self.lines, map(function, self), strict=True))

    def take(self, indices: Iterable[int]) -> Records[T]:
        """The items at these indices, with their lines."""
        indices = list(indices)
        if self.is_stored:
            lines = [self.lines[index] for index in indices]
            ids = None if self._ids is None else [self._ids[index] for index in indices]
            return Records.stored(self.path, lines, Chosen(self._items, indices), ids)
        return Records(self.path, ((self.lines[index], self[index]) for index in indices))


class Mapped(Sequence[S]):
    """What a function makes of items, made whenever one is asked for."""

    def __init__(self, items: Sequence[T], function: Callable[[T], S]) -> None:
        self._items, self._function = items, function

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._function(self._items[range(len(self))[index]])


class Chosen(Sequence[T]):
    """Some of the items, by their indices."""

    def __init__(self, items: Sequence[T], indices: Sequence[int]) -> None:
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._items[self._indices[index]]


@dataclasses.dataclass(frozen=True)
class OnError:
    """What a record that breaks a rule does: it is an error (`stop`), or it is left out and reported (`skip`)."""

    action: Literal["stop", "skip"] = "stop"
    say: Callable[[str], None] = print  # prints a report, which may have several lines
    num_left_out: Counter[str] = dataclasses.field(default_factory=Counter, compare=False)  # by file

    @classmethod
    def of(cls, config: DataConfig, console: Console) -> OnError:
        """As `data.on_error` says, reported on the console."""
        return cls(config.on_error, lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True))

    def check(self, records: Records[T], fault_of: Callable[[T], str | None]) -> Records[T]:
        """Return the records that break no rule, in order.

        Args:
            fault_of: the rule and what came, for an item that breaks one; None for all others.

        Raises:
            UserError: an item breaks a rule, and records must not be left out; or all items do.
        """
        found = {index: fault for index, item in enumerate(records) if (fault := fault_of(item)) is not None}
        faults = [f"{records.place(index)}: {fault}" for index, fault in found.items()]
        if faults and self.action == "stop":
            raise UserError(f"{listed(faults, '; ')}; correct the file, or leave such records out: data.on_error=skip")
        self.report(records.path, faults, len(records))
        return records.take(index for index in range(len(records)) if index not in found)

    def report(self, path: str | Path, faults: list[str], num: int) -> None:
        """Say which of the `num` records of a file were left out.

        Raises:
            UserError: all of them were.
        """
        if not faults:
            return
        if len(faults) == num:
            raise UserError(f"{path}: data.on_error=skip leaves none of {num} records; {listed(faults, '; ')}")
        self.num_left_out[str(path)] += len(faults)
        head = f"{path}: left out {len(faults)} of {num} records (data.on_error=skip):"
        self.say(listed([head, *faults], "\n  ", MAX_NAMED + 1))


STOP = OnError()


class FaultyRecords:
    """The faults that are found while a file is read."""

    def __init__(self, path: str | Path, on_error: OnError) -> None:
        self._path, self._on_error = path, on_error
        self._faults: list[str] = []

    def add(self, number: int, fault: str) -> None:
        """Leave out the record of a line.

        Raises:
            UserError: records must not be left out.
        """
        message = f"{self._path}:{number}: {shortened(fault, MAX_FAULT)}"
        if self._on_error.action == "stop":
            raise UserError(message)
        self._faults.append(message)

    def report(self, num: int) -> None:
        """As `OnError.report`, of the whole file, which has `num` records."""
        self._on_error.report(self._path, self._faults, num)


def listed(texts: Sequence[str], separator: str, num: int = MAX_NAMED) -> str:
    """The first `num` texts, and how many more there are."""
    more = [f"and {len(texts) - num} more"] if len(texts) > num else []
    return separator.join([*texts[:num], *more])

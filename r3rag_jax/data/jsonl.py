"""Files of records: strict reading, in which every error names file and line, and atomic writing of JSON Lines.

A row is parsed by a function that takes the JSON object and raises `FieldError` for a field that breaks a rule
(`fields.py` reads one field); `read_all` adds file and line to it, and leaves the row out where `data.on_error` says
so. `forms.py` lists the forms of a file that are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from r3rag_jax.data.fields import FieldError, Row
from r3rag_jax.data.forms import read_objects
from r3rag_jax.data.records import STOP, FaultyRecords, OnError, Records
from r3rag_jax.errors import UserError
from r3rag_jax.run.files import open_atomic

T = TypeVar("T")

# ---------------------------------------------------------------------------------------- reading


def read_rows(path: str | Path, on_error: OnError = STOP) -> Iterator[tuple[int, Row]]:
    """Yield (line from 1, JSON object) of every record; see `forms.read_objects`.

    Raises:
        UserError: the file cannot be read or has no records; or, unless `on_error` leaves it out, one is not an object.
    """
    return read_parsed(path, lambda row: row, on_error)


def read_parsed(path: str | Path, parse: Callable[[Row], T], on_error: OnError = STOP) -> Iterator[tuple[int, T]]:
    """Yield (line, parsed row) of every record, one at a time.

    Raises:
        UserError: as `read_rows`; or, unless `on_error` leaves the record out, `parse` raised a FieldError.
    """
    return _read(path, lambda row, _: parse(row), FaultyRecords(path, on_error))


def read_all(
    path: str | Path, parse: Callable[[Row, int], T], id_of: Callable[[T], Hashable], on_error: OnError = STOP
) -> Records[T]:
    """All parsed rows of a file, with their lines.

    Args:
        parse: takes the row and its line.

    Raises:
        UserError: as `read_parsed`; or, unless `on_error` leaves the later one out, two rows have equal ids.
    """
    faults = FaultyRecords(path, on_error)
    rows: list[tuple[int, T]] = []
    line_of: dict[Hashable, int] = {}
    for number, item in _read(path, parse, faults):
        id = id_of(item)
        if id in line_of:
            shown = id[0] if isinstance(id, tuple) else id
            faults.add(number, f"ids must be unique; {shown!r} is also on line {line_of[id]}")
        else:
            line_of[id] = number
            rows.append((number, item))
    return Records(path, rows)


def _read(path: str | Path, parse: Callable[[Row, int], T], faults: FaultyRecords) -> Iterator[tuple[int, T]]:
    """As `read_parsed`; `faults` are reported when the last row has been taken."""
    num = 0
    for number, row in read_objects(path):
        num += 1
        try:
            if isinstance(row, FieldError):
                raise row
            item = parse(row, number)
        except FieldError as error:
            faults.add(number, str(error))
        else:
            yield number, item
    if num == 0:
        raise UserError(f"{path}: expected at least one record, e.g. one JSON object per line; the file holds none")
    faults.report(num)


# ---------------------------------------------------------------------------------------- writing


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line. The file appears whole; when `rows` raises, it stays as it was."""
    with open_atomic(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

"""JSONL files: strict reading, in which every error names file and line, and atomic writing.

A row is parsed by a function that takes the JSON object and raises `FieldError` for a field that breaks a rule;
`read_all` adds file and line to it, and leaves the row out where `data.on_error` says so. The `get_…` functions read
one field of a given type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from r3rag_jax.data.records import STOP, FaultyRecords, OnError, Records
from r3rag_jax.errors import UserError
from r3rag_jax.run.files import open_atomic

T = TypeVar("T")
Row = Mapping[str, Any]
_MISSING = object()
_KINDS = {str: "a text", list: "a list", dict: "an object", int: "a whole number", bool: "true or false"}
_MAX_SHOWN = 80  # characters of a value in an error message


class FieldError(ValueError):
    """A field of a row breaks a rule; the reader of the file adds file and line."""


# ---------------------------------------------------------------------------------------- reading


def read_rows(path: str | Path, on_error: OnError = STOP) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, JSON object) of every line that is not blank.

    Raises:
        UserError: the file cannot be read; or, unless `on_error` leaves it out, a line is not a JSON object in UTF-8.
    """
    return read_parsed(path, lambda row: row, on_error)


def read_parsed(path: str | Path, parse: Callable[[Row], T], on_error: OnError = STOP) -> Iterator[tuple[int, T]]:
    """Yield (line number, parsed row) of every line, one at a time.

    Raises:
        UserError: the file cannot be read or has no rows; or, unless `on_error` leaves it out, a line is not a JSON
            object in UTF-8, or `parse` raised a FieldError.
    """
    return _read(path, parse, FaultyRecords(path, on_error))


def read_all(
    path: str | Path, parse: Callable[[Row], T], id_of: Callable[[T], Hashable], on_error: OnError = STOP
) -> Records[T]:
    """All parsed rows of a file, with their lines.

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


def _read(path: str | Path, parse: Callable[[Row], T], faults: FaultyRecords) -> Iterator[tuple[int, T]]:
    """As `read_parsed`; `faults` are reported when the last row has been taken."""
    num = 0
    for number, line in _lines(path):
        num += 1
        try:
            item = parse(_parse_object(line))
        except FieldError as error:
            faults.add(number, str(error))
        else:
            yield number, item
    if num == 0:
        raise UserError(f"{path}: expected at least one JSON object, one per line; the file holds none")
    faults.report(num)


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank; as bytes, so that a line that is not UTF-8 has its number."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{path}: expected a readable JSONL file; {error.strerror}") from error


def _parse_object(line: bytes) -> Row:
    """The JSON object of a line; FieldError otherwise."""
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\ud" in line.lower():  # half of a surrogate pair alone is no Unicode text: no tokenizer takes it
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise FieldError(f"expected UTF-8; got byte {line[error.start]:#04x} at column {error.start + 1}") from error
    except UnicodeEncodeError as error:
        raise FieldError("expected Unicode text; got a lone surrogate escape") from error
    except (ValueError, RecursionError) as error:
        raise FieldError(f"expected one JSON object per line; {error}") from error
    if not isinstance(row, dict):
        raise FieldError(f"expected a JSON object; got {kind_of(row)}")
    return row


# ----------------------------------------------------------------------------------------- fields


def get_field(row: Row, name: str, kind: type, default: Any = _MISSING) -> Any:
    """`row[name]`, an instance of `kind`; with a default the field may also be missing or null.

    Raises:
        FieldError: the field is missing or of another type; true and false are no whole numbers.
    """
    value = row.get(name, _MISSING)
    if default is not _MISSING and (value is _MISSING or value is None):
        return default
    if value is _MISSING:
        raise FieldError(f"expected a field {name!r}; got the fields {sorted(row)}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FieldError(f"{name} must be {_KINDS[kind]}; got {show(value)}")
    return value


def get_text(row: Row, name: str) -> str:
    """`row[name]`, a text that is not blank; FieldError otherwise."""
    text = get_field(row, name, str)
    if not text.strip():
        raise FieldError(f"{name} must not be blank; got {text!r}")
    return text


def get_id(row: Row, name: str) -> str:
    """`row[name]` as an id: a text, or a whole number, which becomes its decimal text; FieldError otherwise."""
    value = row.get(name)
    return str(value) if type(value) is int else get_text(row, name)


def is_id(value: Any) -> bool:
    """Whether `get_id` takes the value: a text that is not blank, or a whole number."""
    return type(value) is int or (isinstance(value, str) and value.strip() != "")


def get_ids(row: Row, name: str) -> list[str]:
    """`row[name]` as a list of ids, empty where the field is missing or null; FieldError otherwise."""
    values = get_field(row, name, list, default=None) or []
    return [get_id({name: value}, name) for value in values]


def kind_of(value: Any) -> str:
    """The JSON type of a value in words, for error messages."""
    return _KINDS.get(type(value), json.dumps(value))


def show(value: Any) -> str:
    """A value as JSON, cut to a length that fits an error message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


# ---------------------------------------------------------------------------------------- writing


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line. The file appears whole; when `rows` raises, it stays as it was."""
    with open_atomic(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

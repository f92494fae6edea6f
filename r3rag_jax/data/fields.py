"""The fields of a record: each is read with the type that it must have, and a FieldError says what came instead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_MISSING = object()
_KINDS = {str: "a text", list: "a list", dict: "an object", int: "a whole number", bool: "true or false"}
_MAX_SHOWN = 80  # characters of a value in an error message


class FieldError(ValueError):
    """A record or a field of it breaks a rule; the reader of the file adds file and line."""


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


def get_texts(row: Row, name: str) -> list[str]:
    """`row[name]` as a list of texts, of which blank ones are left out; empty where it is missing or null.

    One text alone is a list of one.

    Raises:
        FieldError: it is something else.
    """
    value = row.get(name)
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise FieldError(f"{name} must be a list of texts; got {show(value)}")
    return [text for text in values if text.strip()]


def as_rows(value: Any, names: Sequence[str]) -> Any:
    """A list of objects, where the value is one object with an equally long list for each name, as Parquet has it."""
    if not isinstance(value, Mapping) or not all(isinstance(value.get(name), list) for name in names):
        return value
    columns = [value[name] for name in names]
    is_table = len({len(column) for column in columns}) == 1
    return [dict(zip(names, items, strict=True)) for items in zip(*columns, strict=True)] if is_table else value


def show(value: Any) -> str:
    """A value as JSON, cut to a length that fits an error message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def kind_of(value: Any) -> str:
    """The JSON type of a value in words, for error messages."""
    return _KINDS.get(type(value), json.dumps(value))


def first_name(row: Row, names: Sequence[str]) -> str:
    """The first of several names of a field that the row has, before all one that is not null.

    Raises:
        FieldError: it has none of them.
    """
    present = [name for name in names if name in row]
    if not present:
        others = f" (or {', '.join(map(repr, names[1:]))})" if names[1:] else ""
        raise FieldError(f"expected a field {names[0]!r}{others}; got the fields {sorted(row)}")
    return next((name for name in present if row[name] is not None), present[0])

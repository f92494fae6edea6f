"""JSON from outside: files, servers, and what a judge has written. Whatever it holds, reading it ends in a ValueError.

Python's parser recurses: a text of many brackets raises a RecursionError, and a value that it can just read may be too
deep for what is done with it later (to write it, to copy it). So depth has a limit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_DEPTH = 64  # objects and arrays within each other; the data sets and model files that are read have fewer than ten
TOO_DEEP = f"objects and arrays may be nested {MAX_DEPTH} deep; got more"
_DECODER = json.JSONDecoder()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON in Unicode, or is nested too deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    return _checked(value) if sum(map(text.count, brackets)) > MAX_DEPTH else value  # type: ignore[arg-type]


def parse_json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at a position of a text, and where it ends; raises as `parse_json`."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    return (_checked(value) if end - start > MAX_DEPTH else value), end


def _checked(value: Any) -> Any:
    """The value, if it is not too deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for one in level for child in _children(one) if isinstance(child, dict | list)]
        if not level:
            return value
    raise ValueError(TOO_DEEP)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def read_json_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file in UTF-8 holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; the message names it.
    """
    try:
        text = file.read_text(encoding="utf-8")
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{file} must be JSON; {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold an object; got {type(value).__name__}")
    if not is_unicode(value, text):
        raise ValueError(f"{file} must hold Unicode text; got a lone surrogate escape")
    return value


def is_unicode(value: Any, text: str) -> bool:
    """Whether a value whose JSON is `text` holds no half of a surrogate pair alone, which no tokenizer takes."""
    if "\\ud" not in text.lower():
        return True
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

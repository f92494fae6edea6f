"""The fields of a Hugging Face `config.json`, each read with the type and range that it must have.

A config may come from anywhere: `"vocab_size": "32000"`, a negative width, or a billion layers are named here, before
anything is computed from them. All errors are ValueErrors; the reader of the file adds its name.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

MAX_SIZE = 1 << 24  # of a width, a vocabulary or a context
MAX_LAYERS = 1 << 10
MAX_NUMBER = 1e30  # a larger one, and JSON may hold whole numbers of thousands of digits, is no hyperparameter


def get_size(hf: Mapping[str, Any], key: str, default: int | None = None, *, at_most: int = MAX_SIZE) -> int:
    """A whole number from 1 to `at_most`; with a default the field may be missing or null."""
    value = hf.get(key)
    if value is None and default is not None:
        return default
    if key not in hf:
        raise ValueError(f"config.json must hold {key!r}; it is missing")
    if type(value) is not int or not 1 <= value <= at_most:
        raise ValueError(f"{key} must be a whole number from 1 to {at_most}; got {reprlib.repr(value)}")
    return value


def get_number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number above 0 and at most MAX_NUMBER; with a default the field may be missing or null."""
    value = hf.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MAX_NUMBER:
        raise ValueError(f"{key} must be a number above 0; got {reprlib.repr(value)}")
    return float(value)


def get_flag(hf: Mapping[str, Any], key: str) -> bool:
    """True or false; false where the field is missing or null."""
    value = hf.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false; got {reprlib.repr(value)}")
    return bool(value)


def get_object(hf: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object; empty where the field is missing or null."""
    value = hf.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} must be an object; got {reprlib.repr(value)}")
    return dict(value or {})

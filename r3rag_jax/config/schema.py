"""The configuration as a flat list of dotted keys, and the table of them that `--help` prints."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from r3rag_jax.config.experiment import Config
from r3rag_jax.config.section import Section, bounds_of


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: its dotted name, resolved type, default, unit, bounds (`>=1`, `[0,1]`, or empty) and help."""

    name: str
    type: Any
    default: Any
    unit: str
    bounds: str
    help: str


@functools.cache
def schema() -> dict[str, Key]:
    """Every dotted key in the order of declaration: the top level, then section by section."""
    return {key.name: key for _, _, keys in _sections() for key in keys}


def value_of(config: Config, name: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, name.split("."), config)


@functools.cache
def section_names() -> tuple[str, ...]:
    """The dotted names of all sections, nested ones after their parent."""
    return tuple(name for name, _, _ in _sections() if name)


@functools.cache
def _sections() -> tuple[tuple[str, str, tuple[Key, ...]], ...]:
    """(dotted name, title, its own keys) of every section; the top level has the empty name."""
    return tuple(_walk(Config(), "", ""))


def _walk(section: Section, name: str, help: str) -> Iterator[tuple[str, str, tuple[Key, ...]]]:
    keys, nested = [], []
    for own, field in type(section).model_fields.items():
        dotted, value, text = f"{name}.{own}".lstrip("."), getattr(section, own), field.description or ""
        if isinstance(value, Section):
            nested.append((value, dotted, text))
        else:
            unit = typing.cast(dict[str, Any], field.json_schema_extra)["unit"]
            keys.append(Key(dotted, field.annotation, value, unit, _bound_signs(bounds_of(field)), text))
    yield name, help or inspect.cleandoc(type(section).__doc__ or ""), tuple(keys)
    for value, dotted, text in nested:
        yield from _walk(value, dotted, text)


def did_you_mean(name: str, names: Iterable[str] | None = None, suffix: str = "") -> str:
    """`; did you mean '…'?` with the nearest of `names` (all dotted keys when None), or ''.

    The same last word in another section (`rollout.top_k`) counts as nearer than any spelling.
    """
    candidates = list(schema() if names is None else names)
    last = name.rpartition(".")[2]
    twins = [other for other in candidates if other.rpartition(".")[2] == last]
    close = difflib.get_close_matches(name, twins, n=1, cutoff=0.0)
    close = close or difflib.get_close_matches(name, candidates, n=1)
    return f"; did you mean {close[0] + suffix!r}?" if close else ""


# ---------------------------------------------------------------- help


def help_text() -> str:
    """Every key with type, bounds, unit, default and help, one aligned table per section."""
    blocks = []
    for name, title, keys in _sections():
        rows = [("key", "type", "bounds", "unit", "default", "")]
        rows += [
            (key.name, _type_name(key.type), key.bounds or "-", key.unit or "-", _default(key.default), key.help)
            for key in keys
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  " + "  ".join([*map(str.ljust, row[:5], widths), row[5]]).rstrip() for row in rows]
        blocks.append("\n".join([f"{name or 'top level'}: {title}", *lines]))
    return "\n\n".join(blocks) + "\n"


def _bound_signs(bounds: dict[str, Any]) -> str:
    """Bounds without blanks: `>=1`, `>0`, `[0,1]`, `(0,1]`."""
    if "le" in bounds:
        return f"{'(' if 'gt' in bounds else '['}{bounds.get('gt', bounds.get('ge'))},{bounds['le']}]"
    return next((sign + str(bounds[name]) for name, sign in (("ge", ">="), ("gt", ">")) if name in bounds), "")


def _type_name(kind: Any) -> str:
    """A type as `--help` shows it: `float`, `world|files`, `list of str`."""
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"list of {typing.get_args(kind)[0].__name__}"
    return str(kind.__name__)


def _default(value: Any) -> str:
    """A default as one would type it in an override."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "[]"
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"

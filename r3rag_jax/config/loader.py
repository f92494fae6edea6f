"""Configuration in and out: YAML files with `key=value` overrides, and YAML of a configuration.

Every error is one line that names `file:line` or the override, the dotted key, the rule and what came.
Left out: YAML merge keys and tags, environment variables, files that include files.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from r3rag_jax.config.experiment import Config
from r3rag_jax.config.presets import PRESETS
from r3rag_jax.config.redact import redact_override
from r3rag_jax.config.renamed import RENAMED
from r3rag_jax.config.schema import did_you_mean, schema, section_names
from r3rag_jax.config.section import ConfigError
from r3rag_jax.config.values import STRING_TAG, clip, compose, convert, override_node, show

PRESET = "rl.preset"
BUDGET, BUDGETS = "budget", "budgets"  # the key that chooses, and the section of a file to choose from


@dataclasses.dataclass(frozen=True)
class Given:
    """A value that a file or an override gives to a key, and `file:line` or `override '…'`, where it stands."""

    node: yaml.Node
    place: str


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML recipe, then applies `key=value` overrides in order (of one key, the last wins).

    Without a path the overrides change the defaults.

    `rl.preset` sets the keys that it stands for except those given in the same place: an override wins over all of a
    file's keys, and the other overrides win over it.

    Keys are nested or dotted. A recipe may come in sizes: under `budgets:` each has a name and the keys in which it
    differs, and `budget=NAME` takes one, `budget=A,B` several, of which the last wins. (The configuration that a run
    keeps has the names and no `budgets`.)

    Raises:
        ConfigError: the file cannot be read, a key is unknown or repeated, a value has another type or is out of
            bounds, or a relation between keys is broken.
    """
    given, budgets = _read_file(Path(path)) if path is not None else ({}, {})
    changed = dict(map(_read_override, overrides))
    place = str(path or "the command line")
    budget = _chosen_budget(given | changed, budgets, place)
    given = _with_preset(given) | budget | _with_preset(changed)
    values = {name: convert(schema()[name], item.node, item.place) for name, item in given.items()}
    try:
        return _build(values)
    except ConfigError as error:
        places = [given[name].place for name in error.keys if name in given]
        places.sort(key=lambda place: not place.startswith("override "))
        raise ConfigError(f"{places[0] if places else place}: {error}", error.keys) from None


def _with_preset(given: dict[str, Given]) -> dict[str, Given]:
    """The values of a file, a budget or the overrides, and those of the preset that one of them names."""
    if PRESET not in given:
        return given
    item = given[PRESET]
    preset = PRESETS.get(convert(schema()[PRESET], item.node, item.place), {})
    place = f"{item.place} ({PRESET})"
    values = {f"rl.{name}": json.dumps(value).strip('"') for name, value in preset.items()}
    nodes = {name: override_node(schema()[name].type, text, place) for name, text in values.items()}
    return {name: Given(node, place) for name, node in nodes.items()} | given


def _build(values: dict[str, Any]) -> Config:
    """A Config from values by dotted key; the defaults fill the rest."""
    tree = Config().model_dump()  # not the defaults of each class: retrieval.endpoint has others than judge.endpoint
    for dotted, value in values.items():
        *path, name = dotted.split(".")
        section = tree
        for step in path:
            section = section[step]
        section[name] = value
    if "rewards.malformed" not in values:  # its default depends on rewards.compat
        del tree["rewards"]["malformed"]
    return Config(**tree)


def _chosen_budget(given: dict[str, Given], budgets: dict[str, dict[str, Given]], place: str) -> dict[str, Given]:
    """What the budgets that `budget` names change."""
    if BUDGET not in given:
        return {}
    item = given[BUDGET]
    text = convert(schema()[BUDGET], item.node, item.place)
    is_record = not budgets and not item.place.startswith("override")
    if not text or is_record:
        return {}
    found: dict[str, Given] = {}
    for name in map(str.strip, text.split(",")):
        if name not in budgets:
            known = f"one of {', '.join(budgets)}" if budgets else f"empty, for {place} has no budgets"
            raise ConfigError(f"{item.place}: {BUDGET} must be {known}; got {clip(name)!r}", [BUDGET])
        found |= _with_preset(budgets[name])
    return found


# ---------------------------------------------------------------- files and overrides


def _read_file(path: Path) -> tuple[dict[str, Given], dict[str, dict[str, Given]]]:
    """The values of a YAML file by dotted key, and those of its budgets by name."""
    if path.is_dir():
        raise ConfigError(f"{path}: expected a YAML file; got a directory")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_sibling(path)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text; byte {error.start} is not") from None
    root = compose(text, str(path))
    if root is None:
        raise ConfigError(f"{path}: expected keys and values; got an empty file")
    if not isinstance(root, yaml.MappingNode):
        line = root.start_mark.line + 1
        raise ConfigError(f"{path}:{line}: expected keys and values; got {show(root)}")
    sizes = [pair for pair in root.value if isinstance(pair[0], yaml.ScalarNode) and pair[0].value == BUDGETS]
    root.value = [pair for pair in root.value if pair not in sizes]
    return _values(root, path), _budgets(sizes, path)


def _values(root: yaml.MappingNode, path: Path) -> dict[str, Given]:
    given: dict[str, Given] = {}
    for name, item in _walk(root, "", path):
        if name in given:
            raise ConfigError(f"{item.place}: repeated key {name!r}; first at {given[name].place}")
        given[name] = item
    return given


def _budgets(sizes: Sequence[tuple[yaml.Node, yaml.Node]], path: Path) -> dict[str, dict[str, Given]]:
    """The budgets in a file's sections of that name, of which there may be one."""
    budgets: dict[str, dict[str, Given]] = {}
    for number, (key_node, section) in enumerate(sizes):
        place = f"{path}:{key_node.start_mark.line + 1}"
        if number or not isinstance(section, yaml.MappingNode):
            raise ConfigError(f"{place}: {BUDGETS} is one section of named sizes; got {show(section)}")
        for name, keys in section.value:
            place = f"{path}:{name.start_mark.line + 1}"
            if not isinstance(name, yaml.ScalarNode) or not isinstance(keys, yaml.MappingNode):
                raise ConfigError(f"{place}: a budget is a name with keys and values; got {show(keys)}")
            if name.value in budgets:
                raise ConfigError(f"{place}: repeated budget {clip(name.value)!r}")
            budgets[name.value] = _values(keys, path)
            if BUDGET in budgets[name.value]:
                raise ConfigError(f"{place}: a budget must not name a budget; got {clip(name.value)!r}")
    return budgets


def _sibling(path: Path) -> str:
    """A hint at the file beside `path` with the most similar name, or ''."""
    names = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _walk(node: yaml.MappingNode, prefix: str, path: Path) -> Iterator[tuple[str, Given]]:
    """Yields (dotted key, value) of a mapping and of the sections in it."""
    seen: dict[str, str] = {}
    for key_node, value in node.value:
        place = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key must be a name; got {show(key_node)}")
        name = prefix + key_node.value
        if name in seen:
            raise ConfigError(f"{place}: repeated key {name!r}; first at {seen[name]}")
        seen[name] = place
        if name in section_names():
            if not isinstance(value, yaml.MappingNode):
                if name in RENAMED:
                    raise _unknown(name, place, False)
                raise ConfigError(f"{place}: {name} is a section and takes keys and values; got {show(value)}")
            yield from _walk(value, name + ".", path)
        elif name in schema():
            yield name, Given(value, place)
        else:
            raise _unknown(name, place, isinstance(value, yaml.MappingNode))


def _read_override(text: str) -> tuple[str, Given]:
    """The dotted key and value of one `key=value` word."""
    place = f"override {clip(redact_override(text))!r}"
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals:
        raise ConfigError(f"{place}: expected key=value{did_you_mean(name, suffix='=…')}")
    if name in RENAMED or (name not in section_names() and name not in schema()):
        raise _unknown(name, place, False)
    if name in section_names():
        raise ConfigError(f"{place}: {name} is a section; expected one of its keys, {name}.…=value")
    return name, Given(override_node(schema()[name].type, value.strip(), place), place)


def _unknown(name: str, place: str, is_section: bool) -> ConfigError:
    """The error for a key that no section has."""
    if name in RENAMED:
        return ConfigError(f"unknown key {name!r} ({place}); its new name is {RENAMED[name]}")
    hint = did_you_mean(name, section_names() if is_section else None)
    return ConfigError(f"unknown key {clip(name)!r} ({place}){hint or '; --help lists all keys'}")


# ---------------------------------------------------------------- writing


class _Dumper(yaml.SafeDumper):
    """Tuples as `[a, b]` on one line; control characters escaped, for PyYAML loses some raw."""


def _represent_tuple(dumper: yaml.SafeDumper, value: tuple[Any, ...]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


def _represent_str(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar(STRING_TAG, value, style=None if value.isprintable() else '"')


_Dumper.add_representer(tuple, _represent_tuple)
_Dumper.add_representer(str, _represent_str)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(
        config.model_dump(),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=1_000_000,
    )

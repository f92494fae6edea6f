"""Configuration in and out: YAML files, `key=value` overrides, the command line, `--help`.

Strict on purpose: an unknown or repeated key, a value of another type and YAML's quiet guesses (a
`no` that is false, `010` that is eight, `1e-4` that is text) are errors or read as they look.
Left out: YAML merge keys and tags, environment variables, files that include files.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from r3rag_jax.config.schema import Config, ConfigError
from r3rag_jax.errors import USER_ERROR_STATUS

MAX_SHOWN = 60  # characters of a bad value that an error repeats
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
# Keys that recipes and the configurations of earlier runs may still have, and what says the same.
REPLACED = {
    "rl.baseline": "rl.algorithm=rloo",
    "rl.credit": "rl.step_discount (0 for step, 1 for trajectory)",
}
BUDGET, BUDGETS = "budget", "budgets"  # the key that chooses, and the section of a file to choose from
STRING_TAG = "tag:yaml.org,2002:str"
BOOL_TAG = "tag:yaml.org,2002:bool"
NULL_TAG = "tag:yaml.org,2002:null"


@dataclasses.dataclass(frozen=True)
class Field:
    """One key of the schema: its dotted name, its resolved type, its default and its help."""

    name: str
    type: Any
    default: Any
    unit: str
    help: str


@dataclasses.dataclass(frozen=True)
class Given:
    """A value that came for a key, and the words that name its place."""

    node: yaml.Node
    place: str


@functools.cache
def schema() -> dict[str, Field]:
    """Every dotted key in the order of declaration: the top level, then section by section."""
    return {field.name: field for _, fields in _sections() for field in fields}


@functools.cache
def _sections() -> tuple[tuple[str, tuple[Field, ...]], ...]:
    """Pairs (section name, its fields); the top level is the section named ''."""
    top, rest = [], []
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            rest.append((field.name, tuple(_fields(kind, field.name + "."))))
        else:
            top.append(field.name)
    own = tuple(field for field in _fields(Config, "") if field.name in top)
    return (("", own), *rest)


def _fields(cls: Any, prefix: str) -> Iterator[Field]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        meta = field.metadata
        yield Field(
            prefix + field.name,
            hints[field.name],
            field.default,
            meta.get("unit", ""),
            meta.get("help", ""),
        )


def _is_section(name: str) -> bool:
    return name != "" and any(name == section for section, _ in _sections())


# ---------------------------------------------------------------- reading


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML recipe, then applies `key=value` overrides in order (of one key, the last wins).

    Keys are nested or dotted. A recipe may come in sizes: under `budgets:` each has a name and the keys in which it
    differs, and `budget=NAME` takes one. (The configuration that a run keeps has the name and no `budgets`.)

    Raises ConfigError, one line that names `file:line` or the override, for a file that cannot be read, unknown or
    repeated keys, wrong types and broken relations.
    """
    given, budgets = _read_file(Path(path))
    changed = dict(map(_read_override, overrides))
    given = given | _chosen_budget(given | changed, budgets, Path(path)) | changed
    values = {name: _convert(schema()[name], item) for name, item in given.items()}
    try:
        return _build(values)
    except ConfigError as error:
        places = [given[name].place for name in error.keys if name in given]
        places.sort(key=lambda place: not place.startswith("override "))
        raise ConfigError(f"{places[0] if places else path}: {error}", error.keys) from None


def _chosen_budget(given: dict[str, Given], budgets: dict[str, dict[str, Given]], path: Path) -> dict[str, Given]:
    """What the budget that `budget` names changes."""
    if BUDGET not in given:
        return {}
    item = given[BUDGET]
    name = _convert(schema()[BUDGET], item)
    is_record = not budgets and not item.place.startswith("override")
    if not name or is_record:
        return {}
    if name not in budgets:
        known = f"one of {', '.join(budgets)}" if budgets else f"empty, for {path} has no budgets"
        raise ConfigError(f"{item.place}: {BUDGET} must be {known}; got {_clip(name)!r}", [BUDGET])
    return budgets[name]


def _build(values: dict[str, Any]) -> Config:
    """A Config from values by dotted key; the defaults fill the rest."""
    hints = typing.get_type_hints(Config)
    top: dict[str, Any] = {}
    for section, fields in _sections():
        chosen = {field.name.rpartition(".")[2]: values[field.name] for field in fields if field.name in values}
        top.update({section: hints[section](**chosen)} if section else chosen)
    return Config(**top)


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
    root = _compose(text, str(path))
    if root is None:
        raise ConfigError(f"{path}: expected keys and values; got an empty file")
    if not isinstance(root, yaml.MappingNode):
        line = root.start_mark.line + 1
        raise ConfigError(f"{path}:{line}: expected keys and values; got {_show(root)}")
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
            raise ConfigError(f"{place}: {BUDGETS} is one section of named sizes; got {_show(section)}")
        for name, keys in section.value:
            place = f"{path}:{name.start_mark.line + 1}"
            if not isinstance(name, yaml.ScalarNode) or not isinstance(keys, yaml.MappingNode):
                raise ConfigError(f"{place}: a budget is a name with keys and values; got {_show(keys)}")
            if name.value in budgets:
                raise ConfigError(f"{place}: repeated budget {_clip(name.value)!r}")
            budgets[name.value] = _values(keys, path)
            if BUDGET in budgets[name.value]:
                raise ConfigError(f"{place}: a budget must not name a budget; got {_clip(name.value)!r}")
    return budgets


def _sibling(path: Path) -> str:
    """A hint at the file beside `path` with the most similar name, or ''."""
    names = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _compose(text: str, source: str) -> yaml.Node | None:
    """The one YAML document of `text` as a node tree with line marks; None when it is empty."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = error.problem or error.context
        raise ConfigError(f"{source}{line}: expected YAML; {problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: expected YAML; {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: expected YAML of little depth; got too many levels") from None


def _walk(node: yaml.MappingNode, prefix: str, path: Path) -> Iterator[tuple[str, Given]]:
    """Yields (dotted key, value) of a mapping and of the sections in it."""
    seen: dict[str, str] = {}
    for key_node, value in node.value:
        place = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key must be a name; got {_show(key_node)}")
        name = prefix + key_node.value
        if name in seen:
            raise ConfigError(f"{place}: repeated key {name!r}; first at {seen[name]}")
        seen[name] = place
        if _is_section(name):
            if not isinstance(value, yaml.MappingNode):
                raise ConfigError(f"{place}: {name} is a section and takes keys and values; got {_show(value)}")
            yield from _walk(value, name + ".", path)
        elif name in schema():
            yield name, Given(value, place)
        else:
            raise _unknown(name, place, isinstance(value, yaml.MappingNode))


def _read_override(text: str) -> tuple[str, Given]:
    """The dotted key and value of one `key=value` word."""
    place = f"override {_clip(text)!r}"
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals:
        raise ConfigError(f"{place}: expected key=value{_did_you_mean(name, suffix='=…')}")
    if _is_section(name):
        raise ConfigError(f"{place}: {name} is a section; expected one of its keys, {name}.…=value")
    if name not in schema():
        raise _unknown(name, place, False)
    return name, Given(_override_node(schema()[name].type, value.strip(), place), place)


def _override_node(kind: Any, value: str, place: str) -> yaml.Node:
    """The YAML node of an override's value.

    The shell eats quotes, so a key that takes text takes it as it stands (`name=2024`, `a: b`);
    quotes that survive are YAML's. A key that takes a list takes `[a, b]`, or bare `a,b`.
    """
    takes_text = kind is str or typing.get_origin(kind) is Literal
    if takes_text and not value.startswith(("'", '"')):
        return yaml.ScalarNode(STRING_TAG, value)
    if typing.get_origin(kind) is tuple and value and not value.startswith("["):
        value = f"[{value}]"
        if value.endswith(",]"):
            raise ConfigError(f"{place}: expected a value after the last comma; got none")
    return _compose(value, place) or yaml.ScalarNode(NULL_TAG, "")


# ---------------------------------------------------------------- types


def _convert(field: Field, item: Given) -> Any:
    """The Python value of a node for a field; ConfigError when the type is another."""
    kind, node = field.type, item.node
    if typing.get_origin(kind) is not tuple:
        return _scalar(kind, node, f"{item.place}: {field.name}")
    element = typing.get_args(kind)[0]
    if isinstance(node, yaml.SequenceNode):
        nodes = node.value
    elif isinstance(node, yaml.ScalarNode) and node.tag != NULL_TAG:
        nodes = [node]  # `phases: eval` is a list of one
    else:
        raise ConfigError(f"{item.place}: {field.name} must be {_type_words(kind)}; got {_show(node)}")
    return tuple(_scalar(element, child, f"{item.place}: {field.name}[{i}]") for i, child in enumerate(nodes))


def _scalar(kind: Any, node: yaml.Node, subject: str) -> Any:
    """The value of a scalar node as `kind`: bool, int, float, str or a Literal of strings."""
    text = node.value if isinstance(node, yaml.ScalarNode) else ""
    is_text = isinstance(node, yaml.ScalarNode) and node.tag == STRING_TAG
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if kind is bool and is_plain and node.tag == BOOL_TAG:
        return text.lower() in ("true", "yes", "on")
    if kind is int and is_plain and INTEGER.fullmatch(text):
        return int(text)
    if kind is float and is_plain and NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    if kind is str and is_text:
        return text
    if typing.get_origin(kind) is Literal and is_text and text in typing.get_args(kind):
        return text
    close = ""
    if typing.get_origin(kind) is Literal and is_text:
        close = _did_you_mean(text, typing.get_args(kind))
    elif kind is str and text and not is_text:
        close = " (not text in YAML; quote it)"
    raise ConfigError(f"{subject} must be {_type_words(kind)}; got {_show(node)}{close}")


def _type_words(kind: Any) -> str:
    """A type as an error states it."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if typing.get_origin(kind) is tuple:
        noun = {str: "names", float: "numbers", int: "integers"}[typing.get_args(kind)[0]]
        return f"a list of {noun}"
    return {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}[kind]


def _show(node: yaml.Node) -> str:
    """What came, short and on one line."""
    if isinstance(node, yaml.MappingNode):
        return "keys and values"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if node.tag == NULL_TAG and node.value == "":
        return "nothing"
    return repr(_clip(node.value)) if node.tag == STRING_TAG else _clip(node.value)


def _clip(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def _unknown(name: str, place: str, is_section: bool) -> ConfigError:
    """The error for a key that no section has."""
    if name in REPLACED:
        return ConfigError(f"unknown key {name!r} ({place}); it is {REPLACED[name]} now")
    sections = [section for section, _ in _sections() if section]
    hint = _did_you_mean(name, sections if is_section else None)
    return ConfigError(f"unknown key {_clip(name)!r} ({place}){hint or '; --help lists all keys'}")


def _did_you_mean(name: str, names: Iterable[str] | None = None, suffix: str = "") -> str:
    """`; did you mean '…'?` with the nearest of `names` (all dotted keys when None), or ''.

    The same last word in another section (`rollout.top_k`) counts as nearer than any spelling.
    """
    candidates = list(schema() if names is None else names)
    last = name.rpartition(".")[2]
    twins = [other for other in candidates if other.rpartition(".")[2] == last]
    close = difflib.get_close_matches(name, twins, n=1, cutoff=0.0)
    close = close or difflib.get_close_matches(name, candidates, n=1)
    return f"; did you mean {close[0] + suffix!r}?" if close else ""


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
        dataclasses.asdict(config),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=1_000_000,
    )


def help_text() -> str:
    """Every key with type, unit, default and help, one aligned table per section."""
    hints = typing.get_type_hints(Config)
    blocks = []
    for section, fields in _sections():
        rows = [("key", "type", "unit", "default", "")]
        rows += [(f.name, _type_name(f.type), f.unit or "-", _default(f.default), f.help) for f in fields]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  " + "  ".join([*map(str.ljust, row[:4], widths), row[4]]).rstrip() for row in rows]
        title = f"{section}: {hints[section].__doc__}" if section else f"top level: {Config.__doc__}"
        blocks.append("\n".join([title, *lines]))
    return "\n\n".join(blocks) + "\n"


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


# ---------------------------------------------------------------- command line


class FlagParser(argparse.ArgumentParser):
    """argparse whose errors are one line: `error: …`, exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR_STATUS, f"error: {' '.join(message.split())}\n")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def parse_args(
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    extra: Callable[[argparse.ArgumentParser], object] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """The configuration of `--config FILE [key=value …]`, and the parsed flags.

    Args:
      argv: words after the program's name; None takes the process's own.
      prog: what the usage line calls the program.
      description: one sentence for `--help`, which also lists every key.
      extra: adds an entry point's own flags to the parser; read them from the second result.

    Exits with status 2 and one `error: …` line when the words or the configuration are wrong.
    """
    parser = FlagParser(
        prog=prog,
        description=description,
        usage="%(prog)s --config FILE [flags] [key=value ...]",
        epilog="Configuration keys, in the file or as key=value:\n\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="a YAML recipe")
    if extra is not None:
        extra(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a configuration key to change")
    options, unknown = parser.parse_known_intermixed_args(argv)
    for word in unknown:
        parser.error(_unknown_flag(word, parser.flags()))
    try:
        return load_config(options.config, options.overrides), options
    except ConfigError as error:
        parser.error(str(error))


def _unknown_flag(word: str, flags: list[str]) -> str:
    """The error for a flag that the program does not have."""
    name = word.lstrip("-").partition("=")[0]
    hint = f"; did you mean {name + '=…'!r}?" if name in schema() else ""
    hint = hint or _did_you_mean(word.partition("=")[0], flags)
    return f"unknown flag {_clip(word)!r}{hint or '; --help lists all flags and keys'}"

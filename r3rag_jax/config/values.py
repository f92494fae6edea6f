"""YAML nodes as Python values, strictly: each text reads as it looks, or is an error.

YAML 1.1 guesses quietly: `no` is false, `010` is eight, `1e-4` is text. Such guesses are errors here, or read as
they look.
"""

from __future__ import annotations

import math
import re
import typing
from typing import Any, Literal

import yaml

from r3rag_jax.config.schema import Key, did_you_mean
from r3rag_jax.config.section import ConfigError, type_words

MAX_TEXT, MAX_LEVELS, MAX_ALIASES = 1 << 20, 20, 100  # characters, nodes within each other, and aliases of YAML
MAX_SHOWN = 60  # characters of a bad value that an error repeats
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
STRING_TAG = "tag:yaml.org,2002:str"
BOOL_TAG = "tag:yaml.org,2002:bool"
NULL_TAG = "tag:yaml.org,2002:null"


class _Loader(yaml.SafeLoader):
    """PyYAML's loader with limits: nodes are only composed, and no tag is ever constructed."""

    num_levels = num_aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """See yaml.composer; raises a RecursionError beyond MAX_LEVELS, a ValueError beyond MAX_ALIASES."""
        self.num_aliases += self.check_event(yaml.AliasEvent)
        if self.num_aliases > MAX_ALIASES:
            raise ValueError(f"at most {MAX_ALIASES} aliases")
        self.num_levels += 1
        if self.num_levels > MAX_LEVELS:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.num_levels -= 1
        return node


def compose(text: str, source: str) -> yaml.Node | None:
    """The one YAML document of `text` as a node tree with line marks; None when it is empty.

    Raises:
        ConfigError: `text` is no YAML, or exceeds MAX_TEXT, MAX_LEVELS or MAX_ALIASES; the message begins with
            `source`.
    """
    if len(text) > MAX_TEXT:
        raise ConfigError(f"{source}: expected YAML of at most {MAX_TEXT} characters; got {len(text)}")
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = error.problem or error.context
        raise ConfigError(f"{source}{line}: expected YAML; {problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: expected YAML; {error}") from None
    except (ValueError, OverflowError) as error:  # an escape such as "\\U00110000", which is no character
        raise ConfigError(f"{source}: expected YAML; {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: expected YAML of little depth; got too many levels") from None


def override_node(kind: Any, value: str, place: str) -> yaml.Node:
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
    return compose(value, place) or yaml.ScalarNode(NULL_TAG, "")


def convert(key: Key, node: yaml.Node, place: str) -> Any:
    """The Python value of a node for a key.

    Raises:
        ConfigError: the node has another type; the message begins with `place`.
    """
    kind, subject = key.type, f"{place}: {key.name}"
    if typing.get_origin(kind) is not tuple:
        return _scalar(kind, node, subject)
    element = typing.get_args(kind)[0]
    if isinstance(node, yaml.SequenceNode):
        nodes = node.value
    elif isinstance(node, yaml.ScalarNode) and node.tag != NULL_TAG:
        nodes = [node]  # `phases: eval` is a list of one
    else:
        raise ConfigError(f"{subject} must be {type_words(kind)}; got {show(node)}")
    return tuple(_scalar(element, child, f"{subject}[{i}]") for i, child in enumerate(nodes))


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
        close = did_you_mean(text, typing.get_args(kind))
    elif kind is str and text and not is_text:
        close = " (not text in YAML; quote it)"
    raise ConfigError(f"{subject} must be {type_words(kind)}; got {show(node)}{close}")


def show(node: yaml.Node) -> str:
    """What came, short and on one line."""
    if isinstance(node, yaml.MappingNode):
        return "keys and values"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if node.tag == NULL_TAG and node.value == "":
        return "nothing"
    return repr(clip(node.value)) if node.tag == STRING_TAG else clip(node.value)


def clip(text: str) -> str:
    """Text of at most MAX_SHOWN characters."""
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"

"""Random texts, JSON values and bytes that are nearly right, all drawn from one `random.Random`: every case repeats.

Hypothesis draws some hundred examples a second and shrinks them; here a case is a number, and a million take minutes.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

MARKERS = (
    "<think>", "</think>", "<query>", "</query>", "<doc>", "</doc>", "<answer>", "</answer>", "<search>", "</search>",
    "<information>", "</information>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "Step 1:\n",
    "Step 2:\n", "Step 10:", "The problem analysis:", "The retrieval query:", "The retrieval documents:",
    "The final answer:", "The question:", "Relevance: 1", "Relevance: 0.5", "Correct: yes", "Candidates: a | b",
    "user\n", "assistant\n", "system\n", "Doc 1(Title: x)",
)  # fmt: skip
ODD = (
    "", " ", "\n", "\r\n", "\t", "\x00", "\x85", "\u2028", "\u200b", "\ufeff", "\u0130", "e\u0301", "\U0001f600",
    "\u202e", "{", "}", "[", "]", "<", ">", "|", "\\", '"', "'", "{question}", "{{ x }}", "{% x %}", "%s", "../",
    "$(x)", "\ufffd", "\U0010ffff", "ﬁ", "中文", "n", "0", "-1", "1e999", "NaN", "true", "null",
)  # fmt: skip
WORDS = "who wrote the silver harbour in 1931 Paris Lyon and was born near river Darwin yes no".split()
LONG = ("x" * 3000, "a " * 2000, "</query>" * 300, "[" * 5000, '{"a":' * 2000, "9" * 5000)
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, 0.5, -0.0, 1e30, 1e308, float("inf"), float("nan"), "", " ", "x",
    "\x00", "0", "1.5", "true", "../../x", "/etc/passwd", "é" * 9, [], {}, [[]], [None], {"content": 1}, {"a": {}},
    ["x", 1], [1, 2, 3], {"": ""},
)  # fmt: skip


def text(rng: random.Random, longest: int = 12) -> str:
    """Words, protocol markers and odd characters in any order; a long one now and then."""
    if rng.random() < 0.01:
        return rng.choice(LONG) + text(rng, 3)
    kinds: tuple[Sequence[str], ...] = (WORDS, WORDS, MARKERS, ODD, (" ", "\n"))
    pieces = [rng.choice(rng.choice(kinds)) for _ in range(rng.randrange(longest))]
    if rng.random() < 0.2:
        pieces.append(chr(rng.choice((rng.randrange(0x80), rng.randrange(0x800), rng.randrange(0xE000, 0x110000)))))
    return rng.choice(("", " ", " ")).join(pieces)


def value(rng: random.Random) -> Any:
    """A JSON value that is not expected."""
    draw = rng.random()
    if draw < 0.3:
        return text(rng)
    if draw < 0.33:
        return nested(rng.choice((60, 70, 200)), rng)
    return copy.deepcopy(rng.choice(NASTY))


def nested(depth: int, rng: random.Random) -> Any:
    """A value within so many lists and objects."""
    found: Any = 1
    for _ in range(depth):
        found = [found] if rng.random() < 0.5 else {"a": found}
    return found


def changed(tree: Any, rng: random.Random, edits: int = 2) -> Any:
    """A copy of a JSON value with some of its parts replaced, removed, repeated, renamed or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randrange(edits + 1)):
        places = [*_places(tree)]
        if not places:
            return value(rng)
        parent, key = rng.choice(places)
        _edit(parent, key, places, rng)
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with each of its keys or indices."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        one = waiting.pop()
        items = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, child in items:
            found.append((one, key))
            waiting.append(child)
    return found


def _edit(parent: Any, key: Any, places: Sequence[tuple[Any, Any]], rng: random.Random) -> None:
    draw = rng.randrange(6)
    if draw == 0:
        del parent[key]
    elif draw == 1:
        other, name = rng.choice(places)
        parent[key] = copy.deepcopy(other[name])
    elif draw == 2 and isinstance(parent, dict):
        parent[rng.choice((f"{key}s", text(rng, 3), key.upper()))] = parent.pop(key)
    elif draw == 3 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif draw == 4 and isinstance(parent[key], str):
        start = rng.randrange(len(parent[key]) + 1)
        parent[key] = parent[key][:start] + text(rng, 4) + parent[key][start + rng.randrange(3) :]
    else:
        parent[key] = value(rng)


def json_text(tree: Any, rng: random.Random) -> str:
    """A value as JSON, escaped or not; a half surrogate, a huge number or a deep value may come in."""
    found = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    draw = rng.random()
    if draw < 0.02:
        found = found.replace('"', rng.choice(('"\\ud83d', '"\\ude00')), rng.randrange(1, 5))
    elif draw < 0.03:
        found = found.replace("1", rng.choice(("9" * 5000, "1e999", "-" * 3)), 1)
    elif draw < 0.035:
        found = found.replace("[", "[" * rng.choice((50, 100, 5000)), 1)
    return found


def damaged(data: bytes, rng: random.Random, edits: int = 3) -> bytes:
    """Bytes with some of them replaced, cut out, repeated or moved, or the whole cut off."""
    for _ in range(rng.randrange(1, edits + 1)):
        start = rng.randrange(len(data) + 1)
        length = rng.choice((0, 1, 1, 2, 8, len(data) // 3))
        draw = rng.randrange(6)
        if draw == 0:
            data = data[:start]
        elif draw == 1:
            data = data[:start] + data[start : start + length] * 2 + data[start + length :]
        elif draw == 2:
            data = data[:start] + data[start + length :]
        elif draw == 3 and start < len(data):
            data = data[:start] + bytes([data[start] ^ (1 << rng.randrange(8))]) + data[start + 1 :]
        elif draw == 4:
            data = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PAR1", b"PK\x03\x04", b"BZh")) + data
        else:
            data = data[:start] + rng.randbytes(length or 1) + data[start + length :]
    return data


def maybe_damaged(data: bytes, rng: random.Random, share: float = 0.3) -> bytes:
    """The bytes, or damaged ones."""
    return damaged(data, rng) if rng.random() < share else data

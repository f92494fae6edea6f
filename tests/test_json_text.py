"""JSON from outside: what is too deep, no Unicode or no object is a ValueError, never a RecursionError."""

from __future__ import annotations

from pathlib import Path

import pytest

from r3rag_jax.json_text import MAX_DEPTH, parse_json, parse_json_at, read_json_object


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
@pytest.mark.parametrize("times", [MAX_DEPTH + 1, 900, 200_000])
def test_what_is_too_deep_is_refused_closed_or_not(opening: str, times: int) -> None:
    closing = "".join({"[": "]", "{": "}"}[c] for c in reversed(opening) if c in "[{")
    for text in (opening * times, f"{opening * times}1{closing * times}"):
        for read in (parse_json, lambda text: parse_json(text.encode()), lambda text: parse_json_at(text, 0)):
            with pytest.raises(ValueError, match=r"nested 64 deep; got more|Expecting"):
                read(text)
    deep = f"{'[' * MAX_DEPTH}1{']' * MAX_DEPTH}"
    assert str(parse_json(deep)) == deep and parse_json(f"[{deep[1:-1]}, {'[],' * 99}1]")[1] == []


def test_brackets_in_texts_and_beside_each_other_are_not_deep() -> None:
    text = '{"a": "[[[[", "b": [' + "[], {}," * 500 + "1]}"
    assert parse_json(text)["a"] == "[[[[" and parse_json_at(f" {text}x", 1)[1] == len(text) + 1


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"[1]", "must hold an object; got list"),
        (b'{"a": "\\ud83d"}', "must hold Unicode text; got a lone surrogate escape"),
        (b'{"a": "\xff"}', "must be JSON; 'utf-8' codec"),
        (b"{", "must be JSON; Expecting"),
        (b"[" * 200_000, "must be JSON; objects and arrays may be nested"),
    ],
)
def test_a_file_that_holds_no_object_is_named(tmp_path: Path, content: bytes, rule: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rule) as error:
        read_json_object(path)
    assert str(error.value).startswith(str(path))
    path.write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json_object(path) == {"a": "\U0001f600"}

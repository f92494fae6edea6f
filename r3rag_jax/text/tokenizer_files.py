"""What the JSON files beside tokenizer.json say: special tokens, added tokens, chat template; all of it is checked.

The files come from anywhere: a token that is a number, or a template that is a list, is a ValueError that names file
and key.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from r3rag_jax.json_text import read_json_object

CONFIG_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")  # which chat templates may write
NAMED_KEYS = (*SPECIAL_KEYS, "sep_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
MAX_TEMPLATE = 1 << 20  # characters of a chat template


class TokenizerSettings:
    """The contents of special_tokens_map.json and, before it, tokenizer_config.json; missing files are empty."""

    def __init__(self, directory: Path):
        """Read and check the files.

        Raises:
            ValueError: a file is not JSON, or a field of another type; the message names it.
        """
        self._file = directory / CONFIG_FILE
        self.fields = {**read_object(directory / SPECIALS_FILE), **read_object(self._file)}
        for key in NAMED_KEYS:
            self.special(key)
        self.added_tokens({})
        self._template_file = directory / TEMPLATE_FILE
        self.template = self._find_template()

    def special(self, key: str) -> str | None:
        """The text of a special token; the files write a string or {"content": …}. None: they do not name it."""
        value = self.fields.get(key)
        return None if value is None else self._content(value, key)

    def added_tokens(self, vocabulary: Mapping[str, int]) -> list[AddedToken]:
        """The tokens of `added_tokens_decoder`, then special ones: named ones in the vocabulary, additional ones."""
        decoder = self._field("added_tokens_decoder", dict)
        if not all(id.isdecimal() and len(id) < 10 for id in decoder):
            raise self._error("added_tokens_decoder", "an object with ids as names", list(decoder))
        extra = self.fields.get("extra_special_tokens") or []
        extra = list(extra.values()) if isinstance(extra, dict) else self._field("extra_special_tokens", list)
        more = [*extra, *self._field("additional_special_tokens", list)]
        named = [text for key in NAMED_KEYS if (text := self.special(key)) is not None and text in vocabulary]
        tokens = [self._token(decoder[id], "added_tokens_decoder", False) for id in sorted(decoder, key=int)]
        return tokens + [self._token(entry, "a special token", True) for entry in (*named, *more)]

    def _token(self, entry: Any, key: str, is_special: bool) -> AddedToken:
        content = self._content(entry, key)
        if isinstance(entry, str):
            return AddedToken(content, special=is_special)
        options = {name: bool(entry[name]) for name in FLAGS if name in entry}
        return AddedToken(content, special=is_special or bool(entry.get("special")), **options)

    def _content(self, value: Any, key: str) -> str:
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str) or not text:
            raise self._error(key, "a text, or an object with the text as content", value)
        return text

    def _field(self, key: str, kind: type) -> Any:
        value = self.fields.get(key)
        if value is not None and not isinstance(value, kind):
            raise self._error(key, "a list" if kind is list else "an object", value)
        return value or kind()

    def _find_template(self) -> str | None:
        """The default chat template, from chat_template.jinja or else from tokenizer_config.json."""
        text: str | None
        if self._template_file.is_file():
            text = self._template_file.read_text(encoding="utf-8")
        else:
            text = self._default_template(self.fields.get("chat_template"))
        if text is not None and len(text) > MAX_TEMPLATE:
            raise ValueError(f"{self._file}: a chat template has at most {MAX_TEMPLATE} characters; got {len(text)}")
        return text

    def _default_template(self, value: Any) -> str | None:
        if isinstance(value, list):  # several named templates
            if not all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in value):
                raise self._error("chat_template", "a text, or a list of objects with name and template", value)
            value = next((entry["template"] for entry in value if entry["name"] == "default"), None)
        if value is not None and not isinstance(value, str):
            raise self._error("chat_template", "a text", value)
        return value

    def _error(self, key: str, what: str, value: Any) -> ValueError:
        return ValueError(f"{self._file}: {key} must be {what}; got {reprlib.repr(value)}")


def read_object(file: Path) -> dict[str, Any]:
    """The object of a JSON file, empty when there is no such file; raises as `read_json_object`."""
    return read_json_object(file) if file.is_file() else {}

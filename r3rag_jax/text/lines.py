"""Encodes texts that grow line by line: a line is encoded once where its ids do not depend on the lines around it.

The prompts of the protocol `steps` are such texts: each repeats the question, the steps and the passages before it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from r3rag_jax.text.tokenizer import Tokenizer

CACHED_LINES = 1 << 14  # number of lines whose token ids are cached: some tens of megabytes

# Between two lines, of which the first ends in a visible ASCII character, and the next one begins with a letter.
_BETWEEN = re.compile(r"(?<=[!-~]\n)(?=[A-Za-z])")

# Pre-tokenizers whose words never reach across _BETWEEN, and depend on nothing beyond it: no alternative matches a line
# end and then a letter, and what looks ahead, \s+(?!\S), gives the single line end a word of its own either way.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_KNOWN = (_QWEN2, _LLAMA3)


class LineEncoder:
    """`Tokenizer.encode_pieces`, line by line where that gives the same ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._special_ids = tokenizer, tokenizer.special_ids
        self.is_by_line = lines_are_independent(tokenizer.pipeline)
        self._encode_line = functools.lru_cache(CACHED_LINES)(self._ids_and_specials)

    def encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        """Return `Tokenizer.encode_pieces` of the pieces, of which every second one may hold no special token."""
        if self.is_by_line:
            ids, num_special = self._encode("".join(pieces))
            if num_special == sum(self._encode(piece)[1] for piece in pieces[::2]):
                return ids
        return self._tokenizer.encode_pieces(pieces)

    def _encode(self, text: str) -> tuple[list[int], int]:
        """The ids of a text, and how many of them are special tokens."""
        lines = [self._encode_line(line) for line in _BETWEEN.split(text)]
        return [id for ids, _ in lines for id in ids], sum(num_special for _, num_special in lines)

    def _ids_and_specials(self, line: str) -> tuple[tuple[int, ...], int]:
        ids = tuple(self._tokenizer.encode(line))
        return ids, sum(map(self._special_ids.__contains__, ids))


def lines_are_independent(pipeline: dict[str, Any]) -> bool:
    """Whether a tokenizer encodes what stands before and after `_BETWEEN` independently of each other.

    That is known of byte-level BPE with the pre-tokenizers of GPT-2, Llama 3 and Qwen 2, and of no other.

    Args:
        pipeline: what `Tokenizer.pipeline` returns.
    """
    normalizer, model = pipeline["normalizer"], pipeline["model"]
    if (normalizer is not None and normalizer["type"] != "NFC") or model["type"] != "BPE" or model.get("dropout"):
        return False
    if any("\n" in t["content"] or t["lstrip"] or t["rstrip"] or t["single_word"] for t in pipeline["added_tokens"]):
        return False
    found = pipeline["pre_tokenizer"] or {"type": None}
    parts = found["pretokenizers"] if found["type"] == "Sequence" else [found]
    kinds = [_kind(part) for part in parts]
    return None not in kinds and "separates" in kinds and parts[-1]["type"] == "ByteLevel"


def _kind(part: dict[str, Any]) -> str | None:
    """`separates`: splits at `_BETWEEN`; `harmless`: only splits further; None: unknown."""
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return "separates" if part["use_regex"] else "harmless"
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return "separates" if part["pattern"].get("Regex") in _KNOWN else None
    return "harmless" if part["type"] == "Digits" else None

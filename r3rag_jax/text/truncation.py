"""Cuts a text to its first tokens, at a cost that grows with their number and not with the length of the text."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from r3rag_jax.text.tokenizer import Tokenizer

CHARS_PER_TOKEN = 8  # of the first window, and 64 more characters
MAX_GROWTH = 64  # the last window is so many times the first


class Truncated(NamedTuple):
    """The beginning of a text."""

    ids: list[int]  # the first tokens of the text
    text: str  # the characters that these tokens hold whole


def truncate(tokenizer: Tokenizer, text: str, max_tokens: int) -> Truncated:
    """Return the first `max_tokens` (> 0) ids of a text that continues another, and their characters.

    Special tokens stay text.

    Only a window at the beginning of the text is encoded. It grows until the last token that is kept belongs to a word
    (of the tokenizer's pre-tokenization) that at least two more words follow: pre-tokenizers look no further ahead, and
    tokens do not depend on other words, so the ids are those of the whole text. A word that is longer than the last
    window is cut there.
    """
    window = CHARS_PER_TOKEN * max_tokens + 64
    last = MAX_GROWTH * window
    while True:
        part = text[:window]
        encoding = tokenizer.encoding(part)
        ids, offsets = encoding.ids, encoding.offsets
        is_settled = _num_words(encoding.word_ids[max_tokens - 1 :]) > 2
        if len(part) == len(text) or window >= last or is_settled:
            break
        window *= 4
    if len(part) == len(text) and len(ids) <= max_tokens:
        return Truncated(ids, text)
    count = min(max_tokens, len(ids))
    while 0 < count < len(ids) and offsets[count][0] < offsets[count - 1][1]:
        count -= 1  # the next token holds the rest of the last character
    return Truncated(ids[:max_tokens], part[: offsets[count - 1][1]] if count else "")


def _num_words(word_ids: list[int | None]) -> int:
    return sum(1 for _ in itertools.groupby(word_ids))

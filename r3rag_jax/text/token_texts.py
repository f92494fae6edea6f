"""The text of single tokens."""

from __future__ import annotations

from collections.abc import Sequence

from r3rag_jax.text.tokenizer import Tokenizer

BROKEN = "\ufffd"  # stands for bytes that are no whole character
MAX_PIECES = 4  # a character has at most so many bytes, hence tokens


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, with special tokens written out; together they are the text of all.

    A character whose bytes are several tokens is the text of its last one. Tokens are decoded with those before them:
    alone, some tokenizers would drop their leading blank.
    """
    texts, start, done = [], 0, 0  # the tokens from `start` on are decoded; the text of those before `done` is known
    for end in range(1, len(ids) + 1):
        before, text = tokenizer.decode(ids[start:done]), tokenizer.decode(ids[start:end])
        if text.endswith(BROKEN) and end - done < MAX_PIECES and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, done = done, end
    return texts

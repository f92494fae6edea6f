"""The text of single tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from r3rag_jax.text.token_texts import token_texts


@pytest.mark.parametrize("text", ["", "Who wrote <query> it?", "Gödel 日本 🙂!", "a\n\n b"])
def test_texts_are_those_of_the_tokens_and_together_the_whole(text: str, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(tmp_path)  # bytes: ö has two tokens, 日 three, 🙂 four
    ids = tokenizer.encode(text)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
    if "ö" in text:
        assert texts[:3] == ["G", "", "ö"] and texts.count("🙂") == 1


def test_bytes_that_are_no_character_are_shown_as_such(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(tmp_path)
    ids = tokenizer.encode("é")[:1] + tokenizer.encode("abcdef")
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids) == "\ufffdabcdef"

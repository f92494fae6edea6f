"""The first tokens of a text are those of the whole text, however little of it is encoded."""

from __future__ import annotations

import merging
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.text.truncation import truncate


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return merging.tokenizer(tmp_path_factory.mktemp("tokenizer"), "qwen2")


WORDS = st.sampled_from(
    [*merging.TEXTS[1].split(), " ", "\n", "      ", "\n\n\n", "Darwins", "北京", "\U0001f600", "-" * 30]
)


@given(words=st.lists(WORDS, max_size=200), max_tokens=st.integers(1, 20))
def test_ids_are_those_of_the_whole_text(tokenizer: Tokenizer, words: list[str], max_tokens: int) -> None:
    text = " ".join(words)
    ids, shown = truncate(tokenizer, text, max_tokens)
    assert ids == tokenizer.encode(text)[:max_tokens]
    assert text.startswith(shown)
    assert len(tokenizer.encode(text)) > max_tokens or shown == text


@pytest.mark.parametrize(
    ("text", "max_tokens", "shown"),
    [
        (" author author", 1, " author"),
        (" author author", 2, " author author"),
        (" author author author", 2, " author author"),
        (" author <|im_end|>", 4, " author <|"),  # special tokens are text
        ("北京", 1, ""),  # three bytes a character: none is whole
        ("北京", 4, "北"),
        ("北京", 6, "北京"),
        ("", 1, ""),
    ],
)
def test_characters_are_whole(tokenizer: Tokenizer, text: str, max_tokens: int, shown: str) -> None:
    ids, found = truncate(tokenizer, text, max_tokens)
    assert found == shown and len(ids) <= max_tokens


@pytest.mark.parametrize("unit", ["The river runs past the old mill. ", "a", " ", "\n", "北", "\U0001f600 "])
def test_a_long_text_is_not_encoded_as_a_whole(
    tokenizer: Tokenizer, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A passage of 1.8 million characters took some five seconds each time it was shown."""
    encoded: list[int] = []
    encoding = tokenizer.encoding
    monkeypatch.setattr(tokenizer, "encoding", lambda text: encoded.append(len(text)) or encoding(text))
    shorter = truncate(tokenizer, unit * 100_000, 12)
    cost = sum(encoded)
    assert truncate(tokenizer, unit * 200_000, 12) == shorter
    assert sum(encoded) == 2 * cost <= 2 * 14_000
    assert len(shorter.ids) == 12

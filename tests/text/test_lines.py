"""Texts encoded line by line have the ids of the whole text, or are encoded whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import merging
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from r3rag_jax.text.lines import LineEncoder, lines_are_independent
from r3rag_jax.text.tokenizer import Tokenizer

PIECES = st.sampled_from(
    [
        *merging.TEXTS, "\n", "\n\n", " \n", "?\n", ".\n", "\r\n", "\t\n", "\u3000\n", "\x1f\n", "\xa0\n", "don't\n",
        "Step 1:\n", "n\nl", "\u0301", "e", "A", "  ", " ", "'s", "1", "12345", "\U0001f600", "<|im_end|>",
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    kept: dict[str, Tokenizer] = {}

    def make(kind: str) -> Tokenizer:
        if kind not in kept:
            kept[kind] = merging.tokenizer(tmp_path_factory.mktemp(kind), kind, normalizers.NFC())
        return kept[kind]

    return make


@pytest.mark.parametrize("kind", merging.KINDS)
@settings(max_examples=300)
@given(pieces=st.lists(PIECES, max_size=12))
def test_line_by_line_is_as_a_whole(made: Callable[[str], Tokenizer], kind: str, pieces: list[str]) -> None:
    tokenizer, text = made(kind), "".join(pieces)
    lines = LineEncoder(tokenizer)
    assert lines.is_by_line
    for pieces in ([text], ["", text], ["<|im_start|>user\n", text, "<|im_end|>\n"]):
        assert lines.encode_pieces(pieces) == tokenizer.encode_pieces(pieces)


def test_a_line_is_encoded_once(made: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made("qwen2")
    lines, encoded = LineEncoder(tokenizer), list[str]()
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encoded.append(text) or encode(text))
    lines.encode_pieces(["The first?\nThe second.\n"])
    lines.encode_pieces(["The first?\nThe second.\nThe third.\n"])
    assert encoded == ["The first?\n", "The second.\n", "The third.\n"]


@pytest.mark.parametrize("kind", ["sentences", "none"])
def test_with_other_pre_tokenizers_the_whole_text_is_encoded(made: Callable[[str], Tokenizer], kind: str) -> None:
    """Their tokens reach from one line into the next."""
    tokenizer = made(kind)
    lines = LineEncoder(tokenizer)
    assert not lines.is_by_line
    for text in merging.TEXTS:
        assert lines.encode_pieces([text]) == tokenizer.encode(text)
    apart = [i for line in merging.TEXTS[0].splitlines(keepends=True) for i in tokenizer.encode(line)]
    assert apart != tokenizer.encode(merging.TEXTS[0])


def test_what_may_reach_across_lines_is_not_split(made: Callable[[str], Tokenizer], tmp_path: Path) -> None:
    pipeline = made("qwen2").pipeline
    assert lines_are_independent(pipeline)
    token = pipeline["added_tokens"][0]
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"model": {"type": "Unigram"}},
        {"model": {"type": "BPE", "dropout": 0.1}},
        {"added_tokens": [token | {"rstrip": True}]},
        {"added_tokens": [token | {"content": "a\nb"}]},
    ):
        assert not lines_are_independent(pipeline | change)
    tokenizer = merging.tokenizer(tmp_path, "qwen2")
    tokenizer._backend.add_tokens([AddedToken("\nStep", normalized=False)])
    assert LineEncoder(tokenizer).encode_pieces(["x?\nStep"]) == tokenizer.encode("x?\nStep")

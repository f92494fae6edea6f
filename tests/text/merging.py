"""Tokenizers whose tokens reach across the parts of a prompt (`?\\n` is one), with the published pre-tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

from r3rag_jax.text.lines import _LLAMA3, _QWEN2
from r3rag_jax.text.tokenizer import Tokenizer

TEXTS = (
    "The question: Who wrote it?\nStep 1:\nThe problem analysis: I need the author.\nThe retrieval query: author\n",
    'The retrieval documents: "Origin"\nOrigin was written by Charles Darwin in 1859.\n"Darwin"\nHe was\n\nborn.\n',
    "<think> x </think>\n\n<search> y </search>\n\n<information>Doc 1(Title: z) z.\n</information>\n\n",
)
KINDS = ("qwen2", "llama3", "gpt2", "smollm2")


def tokenizer(path: Path, kind: str, normalizer: Any = None) -> Tokenizer:
    """Byte-level BPE of 600 tokens, ChatML."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    tiny.tokenizer(path)  # its settings and template
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    no_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(pattern: str) -> Any:
        return pre_tokenizers.Split(Regex(pattern), "isolated")

    backend = Backend(models.BPE())
    backend.pre_tokenizer = {
        "qwen2": lambda: pre_tokenizers.Sequence([split(_QWEN2), no_words]),
        "llama3": lambda: pre_tokenizers.Sequence([split(_LLAMA3), no_words]),
        "gpt2": lambda: words,
        "smollm2": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]),
        "sentences": lambda: pre_tokenizers.Sequence([split(r"[^.]+\.?"), no_words]),
        "none": lambda: no_words,
    }[kind]()
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(tiny.SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text * 20 for text in TEXTS], trainer)
    backend.save(str(path / "tokenizer.json"))
    assert json.loads((path / "tokenizer.json").read_text())["model"]["merges"]
    return Tokenizer(path)

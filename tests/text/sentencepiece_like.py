"""Tokenizers that put a space before a text, as those converted from SentencePiece do, trained on a few sentences."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from r3rag_jax.text.protocols import TAGS
from r3rag_jax.text.tokenizer import Tokenizer

# prepend: Llama 2's file; always, first: transformers' conversions with legacy or without; bytes: byte-level BPE
KINDS = ("prepend", "always", "first", "never", "bytes")
SPECIALS = ("<unk>", "<s>", "</s>", "[USER]", "[END]", *TAGS)
SENTENCES = (
    "The question: Who wrote the book that the author of Origin read in the year 1859?",
    "Step 1:\nThe problem analysis: I need the author.\nThe retrieval query: Who is the author?",
    "the  answer   is Darwin, the author of Origin.",
)
# The turn of Llama 2, whose marks are ordinary text, and one whose marks are special tokens.
TEMPLATES = {
    "text": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '### User ' + m.content + ' ### Answer' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    "special": "{% for m in messages %}[USER]{{ m.content }}[END]{% endfor %}",
}


def write(path: Path, kind: str, template: str = "text") -> Tokenizer:
    """Train a tokenizer of one of KINDS with one of TEMPLATES."""
    backend = _backend(kind)
    backend.add_special_tokens([AddedToken("[TAIL]", rstrip=True, normalized=False)])
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATES[template]}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(path)


def _backend(kind: str) -> tokenizers.Tokenizer:
    if kind == "bytes":
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options = {"vocab_size": 400, "special_tokens": list(SPECIALS), "show_progress": False}
        backend.train_from_iterator(SENTENCES, trainers.BpeTrainer(initial_alphabet=alphabet, **options))
        return backend
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIALS), show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    # SentencePiece learns merges inside words and applies them to whole texts.
    if kind == "prepend":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=kind, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    return tokenizers.Tokenizer.from_str(json.dumps(content))

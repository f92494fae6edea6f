"""Small real parts for tests: a byte-level tokenizer with the tags, a two-layer Qwen2, a dictionary retriever."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r3rag_jax.config import MeshConfig
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import Decoder
from r3rag_jax.retrieval.base import Hit, RetrievalError
from r3rag_jax.text.protocols import TAGS
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Passage

LLAMA_8B_OF_TWO_LAYERS = DecoderConfig(
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=2,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=14_336,
    rope_theta=500_000.0,
    tie_embeddings=False,
    model_type="llama",
)

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *TAGS)


def normal(seed: int, *shape: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Standard normal numbers, drawn by NumPy: `jax.random` would compile a program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def integers(seed: int, *shape: int, high: int) -> jax.Array:
    """Uniform int32 from 0 to high - 1, drawn by NumPy."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape, np.int32))


def mesh_config(data: int, fsdp: int, tensor: int) -> MeshConfig:
    """The sizes of a mesh's axes, in their order."""
    return MeshConfig(data=data, fsdp=fsdp, tensor=tensor)


def tokenizer(path: Path, specials: Sequence[str] = SPECIALS) -> Tokenizer:
    """Bytes and special tokens, ChatML: 267 ids; the first three of `specials` stay the first three."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(specials), special_tokens=list(specials), initial_alphabet=alphabet
    )
    backend.train_from_iterator([], trainer)
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(path)


def with_several_ends(source: Path, path: Path) -> Tokenizer:
    """A copy of `tokenizer`'s directory whose files name three ends of a turn: eos 0, the template's 2, and 1."""
    path.mkdir(parents=True)
    (path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    (path / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    return Tokenizer(path)


def decoder_config(vocab_size: int = 267) -> dict[str, Any]:
    """The config.json of two layers of width 32."""
    return {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }


def decoder(vocab_size: int = 267, seed: int = 0, scale: float = 0.7) -> Decoder:
    """Two layers of width 32; embeddings scaled so that its distributions are neither uniform nor peaked."""
    model = Decoder(DecoderConfig.from_hf(decoder_config(vocab_size)), rngs=nnx.Rngs(seed))
    model.embed[...] = model.embed[...] * jnp.float32(scale)
    return model


# Jitted: an eager call compiles every operation by itself, which takes longer.
jitted_logits = nnx.jit(lambda model, *arrays: model.logits(model(*arrays)))


def logits(model: Decoder, *arrays: jax.typing.ArrayLike) -> np.ndarray:
    """float32 [B, L, V] for tokens, positions and, where given, segment ids, each int [B, L]."""
    return np.asarray(jitted_logits(model, *map(jnp.asarray, arrays)))


class DictRetriever:
    """Finds a passage by the query's words; `fails_on` raises as a broken server would."""

    def __init__(self, passages: list[Passage], fails_on: str | None = None):
        self.passages, self.fails_on = passages, fails_on

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        if self.fails_on is not None and any(self.fails_on in query for query in queries):
            raise RetrievalError(f"no search for {self.fails_on!r}")
        return [self._rank(set(query.lower().split()))[:k] for query in queries]

    def _rank(self, words: set[str]) -> list[Hit]:
        hits = [Hit(p, float(len(words & set(p.contents.lower().split())))) for p in self.passages]
        return sorted((hit for hit in hits if hit.score > 0), key=lambda hit: (-hit.score, hit.passage.id))

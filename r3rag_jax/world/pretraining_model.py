"""The bundled base model before pretraining: a byte-level BPE tokenizer and a small Qwen2 with induction heads."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import tokenizers

from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import Decoder, rope_frequencies
from r3rag_jax.run.files import write_json, write_text
from r3rag_jax.text.protocols import TAGS
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.world.pretraining import documents, make_world
from r3rag_jax.world.vocabulary import (
    CITY_ENDS,
    COUNTRY_ENDS,
    FIRST_NAMES,
    LAST_NAMES,
    RIVER_ENDS,
    ROOTS,
    TITLE_ADJECTIVES,
    TITLE_NOUNS,
)

VOCAB_SIZE = 2176
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *TAGS)
CONFIG = DecoderConfig.from_hf(
    {
        "model_type": "qwen2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "max_position_embeddings": 2048,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
)


def init_induction_heads(decoder: Decoder, seed: int) -> None:
    """Initialize two heads as an induction circuit (arXiv 2209.11895), which so small a model is slow to learn.

    Reading a passage mostly requires copying the token that followed an earlier occurrence of the current token. Head 0
    of layer 0 attends to the previous token. Under RoPE its biases alone achieve this: with q = a (1, 0) and
    k = a (cos f, sin f) in the plane of frequency f, the attention logit at distance d is sum_f a^2 cos((d - 1) f),
    which is largest at d = 1. The head projects the previous token with R and writes the result into the subspace
    spanned by S. Head 0 of layer 1 matches the query R x with the keys S x, so that it attends to tokens whose
    *previous* token equals the current one; it uses only planes that RoPE rotates slowly. It copies the attended token
    through T. All heads of later layers are initialized to copy the tokens to which they attend; their attention
    patterns are left to training.
    """
    c = decoder.config
    D, H = c.hidden_size, c.head_dim
    frequencies = rope_frequencies(c)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0].astype(np.float32)
    R, S, T = basis[:, :H], basis[:, H : 2 * H], basis[:, 2 * H : 3 * H]
    slow = np.tile(frequencies < 1e-2, 2).astype(np.float32)  # 1 in head dimensions that RoPE rotates slowly
    flat = np.zeros_like(frequencies)

    def write(name: str, layer: int, value: np.ndarray) -> None:
        param = decoder.param(name)
        index = (layer, slice(H)) if value.ndim == 1 or name == "o_proj" else (layer, slice(None), slice(H))
        param[...] = param[...].at[index].set(value)

    for name in ("o_proj", "down_proj"):
        param = decoder.param(name)
        param[...] = 0.2 * param[...]  # so that random outputs of other heads do not drown out the circuit
    write("q_proj", 0, np.zeros((D, H), np.float32))
    write("k_proj", 0, np.zeros((D, H), np.float32))
    write("q_bias", 0, 6 * np.concatenate([flat + 1, flat]))
    write("k_bias", 0, 6 * np.concatenate([np.cos(frequencies), np.sin(frequencies)]))
    write("v_proj", 0, R * slow)
    write("o_proj", 0, 0.25 * S.T)
    write("q_proj", 1, 5 * R * slow)
    write("k_proj", 1, S)
    write("v_proj", 1, T)
    write("o_proj", 1, T.T)
    G = c.num_heads // c.num_kv_heads
    for layer in range(2, c.num_layers):
        for head in range(c.num_heads):
            subspace = basis[:, (head // G) * H : (head // G + 1) * H]
            v_proj, o_proj = decoder.param("v_proj"), decoder.param("o_proj")
            v_proj[...] = v_proj[...].at[layer, :, (head // G) * H : (head // G + 1) * H].set(subspace)
            o_proj[...] = o_proj[...].at[layer, head * H : (head + 1) * H].set(0.5 * subspace.T)


def make_tokenizer(out: Path) -> Tokenizer:
    """Train a byte-level BPE tokenizer on `base` worlds and write its Hugging Face files.

    The training text repeats years, names and the roots of place names, so that each becomes one token, as common
    numbers and names are in large vocabularies. The pre-tokenizer splits the name of a place after its root, so that
    the names in all worlds consist of the same tokens.
    """
    worlds = ((make_world(number), random.Random(number)) for number in range(48))
    texts = ["".join(text for text, _ in document) for world in worlds for document in documents(*world, 9)]
    words = (*map(str, range(1800, 2000)), *FIRST_NAMES, *LAST_NAMES, *ROOTS, *TITLE_ADJECTIVES, *TITLE_NOUNS)
    texts += ["".join(f" {word}" for word in words)] * 2000
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    ends = "|".join((*CITY_ENDS, *COUNTRY_ENDS, *RIVER_ENDS))
    root = tokenizers.Regex(rf" (?:{'|'.join(ROOTS)})(?=(?:{ends})\b)")
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(root, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "tokenizer.json", bpe.to_str(pretty=True))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", settings)
    return Tokenizer(out)

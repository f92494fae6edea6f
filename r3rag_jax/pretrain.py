"""Make the bundled base: a byte-level BPE tokenizer and a small Qwen2, trained on `base` worlds alone.

    python -m r3rag_jax.pretrain --out r3rag_jax/world/base

Hardware and time: see the README's table. Left out on purpose: resuming; the script runs once per release.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from r3rag_jax.config.schema import MeshConfig, ModelConfig, SFTConfig
from r3rag_jax.errors import main_guard
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import Decoder, rope_frequencies
from r3rag_jax.models.hf.decoder_files import load_decoder, save_decoder
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.parallel.shardings import device_put_batch
from r3rag_jax.text.protocols import TAGS
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.training import learner, optimizer
from r3rag_jax.types import SFTBatch
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
TOKENS_PER_STEP = 4096
WINDOW = 64  # documents that wait for a row with room
# Until which share of the steps, tokens of a row, most passages of a document.
STAGES: tuple[tuple[float, int, int], ...] = ((0.1, 128, 1), (0.3, 256, 3), (1.0, 512, 9))
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


def start_copying(decoder: Decoder, seed: int) -> None:
    """Start two heads as an induction circuit (arXiv 2209.11895), which so small a model is slow to find.

    What reading a passage takes most is to copy what once followed the words at hand. Head 0 of layer 0 looks
    at the previous token: under RoPE its biases alone do that, for with q = a (1, 0) and k = a (cos f, sin f)
    in the plane of frequency f the score of distance d is sum_f a^2 cos((d - 1) f), highest at d = 1. It writes that
    token, seen through R, into the subspace of S. Head 0 of layer 1 searches for places whose *previous* token
    is the token at hand, R x against S x, in planes that RoPE hardly turns, and copies the token it finds through T.
    All heads of the later layers start out copying whatever they look at; where to look is theirs to learn.
    """
    c = decoder.config
    D, H = c.hidden_size, c.head_dim
    frequencies = rope_frequencies(c)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0].astype(np.float32)
    R, S, T = basis[:, :H], basis[:, H : 2 * H], basis[:, 2 * H : 3 * H]
    slow = np.tile(frequencies < 1e-2, 2).astype(np.float32)  # head dimensions of planes that keep still
    flat = np.zeros_like(frequencies)

    def write(name: str, layer: int, value: np.ndarray) -> None:
        param = decoder.param(name)
        index = (layer, slice(H)) if value.ndim == 1 or name == "o_proj" else (layer, slice(None), slice(H))
        param[...] = param[...].at[index].set(value)

    for name in ("o_proj", "down_proj"):
        param = decoder.param(name)
        param[...] = 0.2 * param[...]  # lest the circuit drowns in what the other heads write at random
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
            part = basis[:, (head // G) * H : (head // G + 1) * H]
            v_proj, o_proj = decoder.param("v_proj"), decoder.param("o_proj")
            v_proj[...] = v_proj[...].at[layer, :, (head // G) * H : (head // G + 1) * H].set(part)
            o_proj[...] = o_proj[...].at[layer, head * H : (head + 1) * H].set(0.5 * part.T)


def make_tokenizer(out: Path) -> Tokenizer:
    """Train a byte-level BPE tokenizer on `base` worlds and write its Hugging Face files.

    Years, names and roots of places are written out often enough to become one token each, as common
    numbers and names are in large vocabularies. The name of a place is cut behind its root, so that the names
    of every world are made of the same pieces.
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
    bpe.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return Tokenizer(out)


def token_rows(tokenizer: Tokenizer, seed: int, row_length: int, max_passages: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Endless rows (tokens, positions, segment_ids, loss_mask), each int32 / bool [row_length].

    A row is filled from a window of waiting documents, the longest that still fits first.
    """
    waiting: list[tuple[list[int], list[bool]]] = []
    for number in itertools.count(seed):
        rng = random.Random(f"pretraining {number}")
        for document in documents(make_world(number), rng, max_passages):
            ids, mask = [], []
            for text, counts in document:
                piece = tokenizer.encode(text)
                ids += piece
                mask += [counts] * len(piece)
            waiting.append(([*ids[: row_length - 1], tokenizer.pad_id], [*mask[: row_length - 1], False]))
        while len(waiting) > WINDOW:
            row, room = [], row_length
            first = waiting.pop(0)  # so that none waits for ever
            for ids_mask in (first, *sorted(waiting, key=lambda document: -len(document[0]))):
                if len(ids_mask[0]) <= room:
                    row.append(ids_mask)
                    room -= len(ids_mask[0])
            waiting = [document for document in waiting if not any(document is chosen for chosen in row)]
            yield _row(row, row_length)


def _row(documents: list[tuple[list[int], list[bool]]], row_length: int) -> tuple[np.ndarray, ...]:
    tokens, positions, segments = (np.zeros(row_length, np.int32) for _ in range(3))
    loss_mask, at = np.zeros(row_length, bool), 0
    for number, (ids, mask) in enumerate(documents, 1):
        here = slice(at, at + len(ids))
        tokens[here], positions[here], segments[here], loss_mask[here] = ids, np.arange(len(ids)), number, mask
        loss_mask[at] = False
        at += len(ids)
    return tokens, positions, segments, loss_mask


@main_guard
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m r3rag_jax.pretrain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument("--start", type=Path, help="go on from the base in this directory, in the last stage alone")
    parser.add_argument("--steps", type=int, default=3000, help="updates of 4096 tokens")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.start is None:
        tokenizer, stages = make_tokenizer(args.out), STAGES
        decoder = Decoder(CONFIG, rngs=nnx.Rngs(args.seed))
        start_copying(decoder, args.seed)
    else:
        tokenizer, stages = Tokenizer(args.start), STAGES[-1:]
        decoder = load_decoder(args.start, dtype=jnp.float32)
    mesh = make_mesh(MeshConfig())
    graphdef, params = nnx.split(decoder)
    schedule = SFTConfig(lr=args.lr, warmup=0.03, weight_decay=0.01)
    tx = optimizer.sft_optimizer(schedule, args.steps)
    state = learner.init_state(mesh, params, tx)
    step = learner.make_sft_step(mesh, graphdef, tx, ModelConfig(), state)
    history: list[tuple[jax.Array, jax.Array]] = []
    started, ends = time.time(), [round(share * args.steps) for share, _, _ in stages]
    for number in range(args.steps):
        if number in (0, *ends):
            stage = sum(number >= end for end in ends)
            _, row_length, max_passages = stages[stage]
            rows = token_rows(tokenizer, 1_000_000 * (1 + args.seed * len(STAGES) + stage), row_length, max_passages)
        chosen = itertools.islice(rows, TOKENS_PER_STEP // row_length)
        columns: list[Any] = [np.stack(column) for column in zip(*chosen, strict=True)]
        tokens, positions, segments, mask = columns
        state, metrics = step(state, device_put_batch(mesh, SFTBatch(tokens, positions, segments, None, mask)))
        history.append((metrics["loss"], metrics["accuracy"]))
        if number % 50 == 49 or number == args.steps - 1:
            loss, accuracy = np.mean(np.asarray(history[-50:]), axis=0)
            print(
                f"{number + 1:6d}  loss {loss:.4f}  accuracy {accuracy:.4f}  {time.time() - started:.0f} s", flush=True
            )
        if number % 200 == 199 or number == args.steps - 1:
            decoder = nnx.merge(graphdef, state.params)
            save_decoder(decoder, args.out, dtype="bfloat16", generation=tokenizer.generation_ids())
            tokenizer.save(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

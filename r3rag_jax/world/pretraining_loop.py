"""Pretraining of the bundled base model: next-token prediction on `base` worlds.

Left out on purpose: resuming, because pretraining runs once per release.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r3rag_jax.config import MeshConfig, ModelConfig, SFTConfig
from r3rag_jax.models.decoder import Decoder
from r3rag_jax.models.hf.decoder_files import load_decoder, save_decoder
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.parallel.shardings import device_put_batch
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.training import optimizer
from r3rag_jax.training.state import init_state
from r3rag_jax.training.steps import make_sft_step
from r3rag_jax.types import SFTBatch
from r3rag_jax.world.pretraining_model import CONFIG, init_induction_heads, make_tokenizer
from r3rag_jax.world.pretraining_rows import token_rows

TOKENS_PER_STEP = 4096
# Curriculum stages: (fraction of all steps at which the stage ends, tokens per row, maximum passages per document).
STAGES: tuple[tuple[float, int, int], ...] = ((0.1, 128, 1), (0.3, 256, 3), (1.0, 512, 9))


def pretrain(out: Path, *, start: Path | None, num_steps: int, lr: float, seed: int) -> None:
    """Pretrain the base model and write it to the Hugging Face directory `out`, every 200 steps and at the end.

    Args:
        start: directory of a base model to continue from, with the last stage only; None = a new tokenizer and new
            weights, and all stages.
        num_steps: number of updates, of TOKENS_PER_STEP tokens each.
        lr: peak learning rate.
    """
    if start is None:
        tokenizer, stages = make_tokenizer(out), STAGES
        decoder = Decoder(CONFIG, rngs=nnx.Rngs(seed))
        init_induction_heads(decoder, seed)
    else:
        tokenizer, stages = Tokenizer(start), STAGES[-1:]
        decoder = load_decoder(start, dtype=jnp.float32)
    mesh = make_mesh(MeshConfig())
    graphdef, params = nnx.split(decoder)
    schedule = SFTConfig(lr=lr, warmup=0.03, weight_decay=0.01)
    tx = optimizer.sft_optimizer(schedule, num_steps)
    state = init_state(mesh, params, tx)
    step = make_sft_step(mesh, graphdef, tx, ModelConfig(), state)
    history: list[tuple[jax.Array, jax.Array]] = []
    started, ends = time.time(), [round(share * num_steps) for share, _, _ in stages]
    for number in range(num_steps):
        if number in (0, *ends):
            stage = sum(number >= end for end in ends)
            _, row_length, max_passages = stages[stage]
            rows = token_rows(tokenizer, 1_000_000 * (1 + seed * len(STAGES) + stage), row_length, max_passages)
        chosen = itertools.islice(rows, TOKENS_PER_STEP // row_length)
        columns: list[Any] = [np.stack(column) for column in zip(*chosen, strict=True)]
        tokens, positions, segments, mask = columns
        state, metrics = step(state, device_put_batch(mesh, SFTBatch(tokens, positions, segments, None, mask)))
        history.append((metrics["loss"], metrics["accuracy"]))
        if number % 50 == 49 or number == num_steps - 1:
            loss, accuracy = np.mean(np.asarray(history[-50:]), axis=0)
            print(
                f"{number + 1:6d}  loss {loss:.4f}  accuracy {accuracy:.4f}  {time.time() - started:.0f} s", flush=True
            )
        if number % 200 == 199 or number == num_steps - 1:
            decoder = nnx.merge(graphdef, state.params)
            save_decoder(decoder, out, dtype="bfloat16", generation=tokenizer.complete_generation({}))
            tokenizer.save(out)

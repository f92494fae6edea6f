"""Estimated temporaries of each program on one device: gradients, activations, logits, gathered weights.

A rule of thumb that stays within a factor of two of what XLA allocates on accelerators; it says which setting is worth
compiling. `python -m r3rag_jax.compile` has the compiler's numbers.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import Mesh

from r3rag_jax.config import Config
from r3rag_jax.models.attention import QUERY_CHUNK
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import param_shapes
from r3rag_jax.parallel.blocks import MAX_ELEMENTS
from r3rag_jax.parallel.shardings import batch_ways
from r3rag_jax.parallel.target import Target
from r3rag_jax.rl.algorithms import ALGORITHMS
from r3rag_jax.training.micro_batches import num_micro_batches

PREFILL_TOKENS = 4096  # of a device in one call
LOSS_TOKENS = 512  # of a device, whose logits exist at once; see training/losses.py


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Bytes on one device."""

    residual: int  # a token's residual stream
    activations: int  # what one layer keeps for a token
    scores: int  # attention scores of QUERY_CHUNK queries, for one token of a row's keys, with their exponentials
    layer_weights: int  # of one layer in the compute dtype, gathered over fsdp
    layer_params: int  # elements of one layer, gathered over fsdp
    logits: int  # a token's logits in float32, with their exponentials and gradient
    block: int  # elements of the output matrix, or of the embeddings, that a device gathers at once; 0: none


def estimated_temporaries(config: Config, decoder: DecoderConfig, mesh: Mesh, trained_bytes: int) -> dict[str, int]:
    """Bytes by program: `sft`, `score`, `rl` and `prefill`, `decode`.

    Args:
        mesh: of the programs.
        trained_bytes: of the trained parameters on one device, whose gradients are as large.
    """
    sizes = _sizes(config, decoder, mesh)
    rl, rollout = config.rl, config.rollout
    has_value_model = ALGORITHMS[rl.algorithm].needs_critic and rl.critic.kind == "separate"
    slots = rollout.slots // batch_ways(mesh, rollout.slots)
    gathered = 2 * sizes.layer_weights if rollout.shard_weights and mesh.shape["fsdp"] > 1 else 0
    return {
        "sft": _step(config, sizes, decoder, mesh, config.sft.batch_rows, config.sft.row_length, 1, trained_bytes),
        "score": _forward(sizes, decoder, mesh, rl.batch_rows, rl.row_length) + sizes.layer_weights,
        "rl": _step(
            config, sizes, decoder, mesh, rl.batch_rows, rl.row_length, 2 if has_value_model else 1, trained_bytes
        ),
        "prefill": gathered
        + min(PREFILL_TOKENS, slots * rollout.max_length) * (2 * sizes.residual + sizes.activations),
        "decode": slots * sizes.logits + gathered,
    }  # fmt: skip


def _sizes(config: Config, decoder: DecoderConfig, mesh: Mesh) -> _Sizes:
    tensor = mesh.shape["tensor"]
    item = jnp.dtype(config.model.dtype).itemsize
    heads = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim
    shapes = param_shapes(decoder)
    outside = ("embed", "lm_head", "final_norm")
    layers = sum(math.prod(shape) for name, shape in shapes.items() if name not in outside)
    layer = layers // decoder.num_layers // tensor
    return _Sizes(
        residual=decoder.hidden_size * item,
        activations=item * (4 * decoder.hidden_size + (2 * heads + 3 * decoder.ffn_size) // tensor),
        scores=0
        if config.model.attention in ("splash", "blocks")
        else 3 * 4 * QUERY_CHUNK * -(-decoder.num_heads // tensor),
        layer_weights=item * layer,
        layer_params=layer,
        logits=3 * 4 * -(-decoder.vocab_size // tensor),
        block=min(decoder.hidden_size * decoder.vocab_size, MAX_ELEMENTS) if mesh.shape["fsdp"] * tensor > 1 else 0,
    )


def _step(
    config: Config,
    sizes: _Sizes,
    decoder: DecoderConfig,
    mesh: Mesh,
    num_rows: int,
    length: int,
    num_models: int,
    trained_bytes: int,
) -> int:
    """An update: gradients, the residual stream at every layer, and the backward pass of one layer or of the loss.

    XLA casts all of a device's shards to the compute dtype before the loop over layers.
    """
    rows = num_rows // batch_ways(mesh, num_rows)
    micro = rows // num_micro_batches(rows, length, config.model.micro_tokens)
    tokens, layers = micro * length, decoder.num_layers
    kept = {"full": sizes.residual, "dots": sizes.residual + sizes.activations // 2, "none": sizes.activations}
    checkpoints = num_models * layers * tokens * kept[config.model.remat]
    layer = 2 * tokens * sizes.activations + micro * length * sizes.scores
    layer += 2 * sizes.layer_weights + 4 * sizes.layer_params
    gradients = trained_bytes * (2 if micro < rows else 1)
    item = jnp.dtype(config.model.dtype).itemsize
    casts = trained_bytes * item // 4 if item < 4 else 0
    loss = tokens * 2 * sizes.residual + _loss(sizes, decoder, mesh, tokens)
    return gradients + casts + checkpoints + max(layer, loss)


def _loss(sizes: _Sizes, decoder: DecoderConfig, mesh: Mesh, tokens: int) -> int:
    """The logits of a chunk; where the output matrix is split, of a block with its gradient, and of hidden states."""
    if not sizes.block:
        return min(tokens, LOSS_TOKENS) * sizes.logits + 2 * decoder.hidden_size * decoder.vocab_size
    # On TPU a gradient takes as much again: XLA writes its reduce-scatter as an all-reduce of which a device keeps its
    # share.
    gradients = 2 if Target.of(mesh).platform == "tpu" else 1
    tokens //= mesh.shape["tensor"]
    logits = min(tokens, 2 * LOSS_TOKENS) * 3 * 4 * sizes.block // decoder.hidden_size
    return logits + tokens * 2 * sizes.residual + (2 + 4 * gradients) * sizes.block


def _forward(sizes: _Sizes, decoder: DecoderConfig, mesh: Mesh, num_rows: int, length: int) -> int:
    """A forward pass over a batch, and the log-probabilities of its tokens."""
    tokens = num_rows // batch_ways(mesh, num_rows) * length
    layer = tokens * (sizes.activations + sizes.scores)
    return tokens * 2 * sizes.residual + max(layer, _loss(sizes, decoder, mesh, tokens))

"""The decoder as the sampler runs it: a forward behind a KV cache.

Shapes: B rows, C tokens of a chunk, S cache slots, D width, N query heads, K kv heads, G = N / K, H head dim,
F feed-forward width, V vocab. On a mesh K counts head slots and G the query heads of a slot, see `layout.HeadSlots`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import Decoder, norm_and_rope, rms_norm, rope_tables
from r3rag_jax.sampler.cache.base import Extent, LayerCache
from r3rag_jax.sampler.cache.kv_cache import KVCache
from r3rag_jax.sampler.exchange import ALONE, Exchange
from r3rag_jax.sampler.layout import PAD, HeadSlots, Split, round_up
from r3rag_jax.sampler.ops import XLA_ON_ONE_CPU, SamplerOps

LANES = 128  # entries of the last axis of a tile of a TPU

# Axis of each matrix along which it is split; parameters that are not listed are whole on every device.
SPLIT_AXIS = {"embed": 1, "lm_head": 0, "qkv": 0, "qkv_bias": 0, "o": 0, "gate": 0, "up": 0, "down": 0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedDecoder:
    """A decoder's parameters in the layout of the sampler: one dict per layer, matrices in the compute dtype.

    Adapters are merged. Layers are not stacked, because a decode loop would slice and so copy every weight at every
    step, which takes half of the step's time on a CPU. Queries, keys and values are one matrix, equal shares of whose
    rows are what a device needs, so that nothing is reordered in a call:

        qkv [K * (G + 2) * H, D]   per kv head: the G query heads that read it, its key, its value
        qkv_bias [K * (G + 2) * H]
        o [N * H, D]
        gate [F, D]   not fused with `up`: XLA would copy either the matrix or its product to tell them apart
        up [F, D]
        down [F, D]

    On one CPU device `o` and `down` are transposed, [D, N * H] and [D, F], as its kernels read them. Elsewhere the axis
    that is split comes first: a device's share of it may be small, and the last axis is padded to 128 entries on a TPU.

    On a mesh every matrix is split over `tensor`, and over `fsdp` too where `shardings` splits the weights: by heads,
    hidden units or vocabulary; the embeddings by columns. Sizes are padded, see `layout`.
    """

    embed: jax.Array  # [V, D]
    layers: tuple[dict[str, jax.Array], ...]
    final_norm: jax.Array
    lm_head: jax.Array | None  # [V, D]; None: tied to `embed`, on one device
    config: DecoderConfig = dataclasses.field(metadata={"static": True})
    ops: SamplerOps = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, decoder: Decoder, ops: SamplerOps = XLA_ON_ONE_CPU) -> CachedDecoder:
        """Convert a decoder's parameters to the layout of the sampler; traceable under jit."""
        config, stacked, split = decoder.config, decoder.layer_params(), Split.of(ops.target)
        embed, lm_head = decoder.table().astype(decoder.dtype), None
        if not config.tie_embeddings:
            lm_head = decoder.output_weight().T
        elif not ops.target.is_one_device:  # the one is split by columns, the other by rows
            lm_head = embed
        return cls(
            embed=pad_axis(embed, 1, _table_width(config.hidden_size, split, ops)),
            layers=tuple(_layer(config, ops, {n: x[i] for n, x in stacked.items()}) for i in range(config.num_layers)),
            final_norm=decoder.param("final_norm")[...],
            lm_head=None if lm_head is None else pad_axis(lm_head, 0, split.padded(config.vocab_size)),
            config=config,
            ops=ops,
        )

    def shardings(self, mesh: Mesh, split: bool) -> CachedDecoder:
        """Sharding of each parameter: over `tensor`, and with `split` over `fsdp` too.

        Decode then adds partial sums over `fsdp` as over `tensor`; prefill gathers a layer's weights. See `exchange`.
        """
        axes = ("tensor", "fsdp") if split else ("tensor",)

        def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            name = str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
            spec = [None] * SPLIT_AXIS[name] + [axes] if name in SPLIT_AXIS else []
            return NamedSharding(mesh, PartitionSpec(*spec))

        return jax.tree_util.tree_map_with_path(one, self)

    def extend(
        self,
        cache: KVCache,
        tokens_BC: jax.Array,
        starts_B: jax.Array,
        rows_B: jax.Array | None = None,
        extent: Extent | None = None,
        exchange: Exchange = ALONE,
    ) -> tuple[KVCache, jax.Array]:
        """Append C tokens to B rows of the cache; returns the new cache and the hidden states [B, C, D].

        The tokens of row b take positions starts_B[b] .. starts_B[b] + C - 1. Their keys and values are written there;
        positions >= S are dropped. A query sees the cache at positions up to its own, so entries beyond it (of an
        abandoned continuation or of padding) are overwritten before they are read.

        Args:
            tokens_BC: int32.
            starts_B: int32, position of each row's first token.
            rows_B: int32, indices of the cache rows; None: all rows in order. Out-of-range rows are not written; their
                outputs are undefined.
            extent: see `LayerCache.attend`.
            exchange: how the device works together with the others of a mesh; the arrays are then its own shares.
        """
        positions_BC = starts_B[:, None] + jnp.arange(tokens_BC.shape[1])
        cos, sin = rope_tables(self.config, positions_BC)
        x, layers = exchange.embed(functools.partial(self.ops.embed, self.embed), tokens_BC), []
        x = x[..., : self.config.hidden_size]
        for w, layer in zip(self.layers, cache.layers, strict=True):
            layer, x = _extend_layer(
                self.config, self.ops, exchange, w, layer, x, cos, sin, positions_BC, rows_B, extent
            )
            layers.append(layer)
        return KVCache(tuple(layers)), rms_norm(x, self.final_norm, self.config.norm_eps, self.ops.target)

    def logits(self, hidden: jax.Array, exchange: Exchange = ALONE) -> jax.Array:
        """Project hidden states [..., D] to float32 logits [..., V]; on a mesh, to the device's share, see `sample`."""
        return self.ops.multiply(exchange.whole(hidden), self.embed if self.lm_head is None else self.lm_head)


def pad_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Pad an axis with zeros up to `size` entries."""
    missing = size - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _table_width(width: int, split: Split, ops: SamplerOps) -> int:
    """Columns of the embedding table, such that a device's share is whole tiles if that pads at most a fifth more.

    Of other shares a TPU makes a reordered copy in every call: 39 MB for 7B on 64 devices with fsdp=64.
    """
    if not ops.target.is_cpu:
        for ways in (split.ways, split.tensor):
            whole_tiles = split.padded(round_up(width, ways * LANES))
            if ways > 1 and whole_tiles <= 1.2 * width:
                return whole_tiles
    return split.padded(width)


def _layer(config: DecoderConfig, ops: SamplerOps, w: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Convert one layer's parameters from the layout of `Decoder` to that of `CachedDecoder`."""
    split = Split.of(ops.target)
    slots = HeadSlots(config.num_heads, config.num_kv_heads, split.tensor)

    def taken(x: jax.Array, heads: np.ndarray) -> jax.Array:
        """x [heads, H, ...] -> [*heads.shape, H, ...], with zeros for PAD."""
        if not np.array_equal(heads.ravel(), np.arange(len(x))):
            x = jnp.where((heads.ravel() != PAD).reshape(-1, *(1,) * (x.ndim - 1)), x[heads.ravel()], 0)
        return x.reshape(*heads.shape, *x.shape[1:])

    def by_device(x: jax.Array) -> jax.Array:
        """x [K, heads, H, *rest] -> [rows, *rest]; a `tensor` device's rows are padded so that `fsdp` divides them."""
        rest = x.shape[3:]
        x = x.reshape(split.tensor, -1, *rest)
        return pad_axis(x, 1, round_up(x.shape[1], split.fsdp)).reshape(-1, *rest)

    def qkv(kind: str) -> jax.Array:
        heads = [w[f"{name}_{kind}"].T.reshape(-1, config.head_dim, *w[f"{name}_{kind}"].shape[:-1]) for name in "qkv"]
        kv = slots.kv_heads()[:, None]
        return jnp.concatenate([taken(x, at) for x, at in zip(heads, (slots.query_heads(), kv, kv), strict=True)], 1)

    def hidden_units(x: jax.Array) -> jax.Array:
        return pad_axis(x, 0, split.padded(config.ffn_size))

    layer = {name: value for name, value in w.items() if name.endswith("_norm")}
    if config.attention_bias:
        layer["qkv_bias"] = by_device(qkv("bias"))
    o = taken(w["o_proj"].reshape(-1, config.head_dim, config.hidden_size), slots.query_heads())
    return layer | {
        "qkv": by_device(qkv("proj")),
        "o": ops.input_major(by_device(o)),
        "gate": hidden_units(w["gate_proj"].T),
        "up": hidden_units(w["up_proj"].T),
        "down": ops.input_major(hidden_units(w["down_proj"])),
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # jitted so that it is traced once, not per layer; XLA inlines it
def _extend_layer(
    config: DecoderConfig,
    ops: SamplerOps,
    exchange: Exchange,
    w: dict[str, jax.Array],
    cache: LayerCache,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions_BC: jax.Array,
    rows_B: jax.Array | None,
    extent: Extent | None,
) -> tuple[LayerCache, jax.Array]:
    w = exchange.after(x, w)

    def normed(name: str) -> jax.Array:
        return exchange.whole(rms_norm(x, w[name], config.norm_eps, ops.target))

    def product(h: jax.Array, name: str) -> jax.Array:
        """h times a matrix that is split by its outputs."""
        return ops.multiply(h, exchange.weight(w[name])).astype(x.dtype)

    def added(y: jax.Array, name: str) -> jax.Array:
        """The residual stream plus y times a matrix that is split by its inputs."""
        return exchange.add(x, ops.multiply_inputs(y, exchange.weight(w[name])))

    split, (B, C), K, H = Split.of(ops.target), positions_BC.shape, cache.v.shape[1], config.head_dim
    heads = product(normed("input_norm"), "qkv")
    if config.attention_bias:
        heads = heads + exchange.weight(w["qkv_bias"])
    G = HeadSlots(config.num_heads, config.num_kv_heads, split.tensor).queries_per_slot
    heads = exchange.own_rows(heads)[..., : K * (G + 2) * H].reshape(B, C, K, G + 2, H)
    q, k, v = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
    q, k = norm_and_rope(config, w, q.reshape(B, C, K * G, H), k, cos, sin, ops.target)
    cache = cache.write(k, v, positions_BC, rows_B)
    out = cache.attend(q, positions_BC, rows_B, extent).reshape(B, C, -1)
    x = added(exchange.own_columns(pad_axis(out, 2, round_up(out.shape[2], split.fsdp))), "o")
    h = normed("post_norm")
    return cache, added(jax.nn.silu(product(h, "gate")) * product(h, "up"), "down")

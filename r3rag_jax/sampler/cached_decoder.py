"""The decoder as the sampler runs it: a forward behind a KV cache.

Shapes: B rows, C tokens of a chunk, S cache slots, D width, N query heads, K kv heads, G = N / K, H head dim,
F feed-forward width, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import Decoder, norm_and_rope, rms_norm, rope_tables
from r3rag_jax.parallel.shardings import tree_shardings
from r3rag_jax.sampler.cache.base import Extent, LayerCache
from r3rag_jax.sampler.cache.kv_cache import KVCache
from r3rag_jax.sampler.ops import XLA_ON_ONE_CPU, SamplerOps

# Logical axes of each parameter by name. Parameters that are not listed are replicated.
SPLIT_AXES: dict[str, tuple[str | None, ...]] = {
    "embed": ("vocab", "embed"),
    "qkv": ("kv_heads", "embed"),
    "qkv_bias": ("kv_heads",),
    "o": ("embed", "heads"),
    "gate_up": ("mlp", "embed"),
    "down": ("embed", "mlp"),
    "lm_head": ("vocab", "embed"),
}
WHOLE_AXES = {name: tuple(None if axis == "embed" else axis for axis in axes) for name, axes in SPLIT_AXES.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedDecoder:
    """A decoder's parameters in the layout of the sampler: one dict per layer, matrices [out, in] in the compute dtype.

    Adapters are merged. Layers are not stacked, because a decode loop would slice and so copy every weight at every
    step, which takes half of the step's time on a CPU. Projections of the same input are fused into one matrix. Its
    rows are ordered by kv head or hidden unit, so that a device's share of the rows is a set of whole heads or units:

        qkv [K * (G + 2) * H, D]   per kv head: the G query heads that read it, its key, its value
        qkv_bias [K * (G + 2) * H]
        o [D, N * H]
        gate_up [F * 2, D]   per hidden unit: its gate row, its up row
        down [D, F]
    """

    embed: jax.Array  # [V, D]
    layers: tuple[dict[str, jax.Array], ...]
    final_norm: jax.Array
    lm_head: jax.Array | None  # [V, D]; None: tied to `embed`
    config: DecoderConfig = dataclasses.field(metadata={"static": True})
    ops: SamplerOps = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, decoder: Decoder, ops: SamplerOps = XLA_ON_ONE_CPU) -> CachedDecoder:
        """Convert a decoder's parameters to the layout of the sampler; traceable under jit."""
        config, stacked = decoder.config, decoder.layer_params()
        return cls(
            embed=decoder.table().astype(decoder.dtype),
            layers=tuple(_layer(config, {n: x[i] for n, x in stacked.items()}) for i in range(config.num_layers)),
            final_norm=decoder.param("final_norm")[...],
            lm_head=None if config.tie_embeddings else decoder.output_weight().T,
            config=config,
            ops=ops,
        )

    def shardings(self, mesh: Mesh, split: bool) -> CachedDecoder:
        """Sharding of each parameter: over `tensor`, and with `split` over `fsdp` too (each step then gathers them)."""
        return tree_shardings(mesh, self, SPLIT_AXES if split else WHOLE_AXES)

    def extend(
        self,
        cache: KVCache,
        tokens_BC: jax.Array,
        starts_B: jax.Array,
        rows_B: jax.Array | None = None,
        extent: Extent | None = None,
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
        """
        positions_BC = starts_B[:, None] + jnp.arange(tokens_BC.shape[1])
        cos, sin = rope_tables(self.config, positions_BC)
        x, layers = self.ops.embed(self.embed, tokens_BC), []
        for w, layer in zip(self.layers, cache.layers, strict=True):
            layer, x = _extend_layer(self.config, self.ops, w, layer, x, cos, sin, positions_BC, rows_B, extent)
            layers.append(layer)
        return KVCache(tuple(layers)), rms_norm(x, self.final_norm, self.config.norm_eps, self.ops.target)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Project hidden states [..., D] to float32 logits [..., V]."""
        return self.ops.multiply(hidden, self.embed if self.lm_head is None else self.lm_head)


def _layer(config: DecoderConfig, w: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Convert one layer's parameters from the layout of `Decoder` to that of `CachedDecoder`."""

    def interleaved(names: Iterable[str], groups: int) -> jax.Array:
        """Fuse matrices [..., out] to [sum of outs, ...]: group 0 of each matrix in turn, then group 1 of each, ..."""
        grouped = [w[name].T.reshape(groups, -1, *w[name].shape[:-1]) for name in names]
        return jnp.concatenate(grouped, axis=1).reshape(-1, *grouped[0].shape[2:])

    layer = {name: value for name, value in w.items() if name.endswith("_norm")}
    if config.attention_bias:
        layer["qkv_bias"] = interleaved(("q_bias", "k_bias", "v_bias"), config.num_kv_heads)
    return layer | {
        "qkv": interleaved(("q_proj", "k_proj", "v_proj"), config.num_kv_heads),
        "o": w["o_proj"].T,
        "gate_up": interleaved(("gate_proj", "up_proj"), config.ffn_size),
        "down": w["down_proj"].T,
    }


@functools.partial(jax.jit, static_argnums=(0, 1))  # jitted so that it is traced once and not per layer; XLA inlines it
def _extend_layer(
    config: DecoderConfig,
    ops: SamplerOps,
    w: dict[str, jax.Array],
    cache: LayerCache,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions_BC: jax.Array,
    rows_B: jax.Array | None,
    extent: Extent | None,
) -> tuple[LayerCache, jax.Array]:
    def product(x: jax.Array, name: str) -> jax.Array:
        return ops.multiply(x, w[name]).astype(x.dtype)

    def norm(name: str) -> jax.Array:
        return rms_norm(x, w[name], config.norm_eps, ops.target)

    B, C, _ = x.shape
    heads = product(norm("input_norm"), "qkv")
    if config.attention_bias:
        heads = heads + w["qkv_bias"]
    heads = heads.reshape(B, C, config.num_kv_heads, -1, config.head_dim)
    q, k, v = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
    q, k = norm_and_rope(config, w, q.reshape(B, C, config.num_heads, config.head_dim), k, cos, sin, ops.target)
    cache = cache.write(k, v, positions_BC, rows_B)
    x = x + product(cache.attend(q, positions_BC, rows_B, extent).reshape(B, C, -1), "o")
    pairs = product(norm("post_norm"), "gate_up").reshape(B, C, config.ffn_size, 2)
    return cache, x + product(jax.nn.silu(pairs[..., 0]) * pairs[..., 1], "down")

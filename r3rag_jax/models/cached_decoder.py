"""The decoder as the sampler runs it: a forward behind a KV cache.

Shapes: B rows, C tokens of a chunk, S cache slots, D width, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r3rag_jax.models.cache import KVCache, LayerCache
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import PARAM_AXES, Decoder, finish_layer, qkv, rms_norm, rope_tables
from r3rag_jax.models.matmul import turned, wants_as_it_lies, wide_product
from r3rag_jax.sharding import tree_shardings

APART_AXES = {name: tuple(axis for axis in axes if axis != "layers") for name, axes in PARAM_AXES.items()}
WHOLE_AXES = {name: tuple(None if axis == "embed" else axis for axis in axes) for name, axes in APART_AXES.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedDecoder:
    """Parameters of a decoder, each layer's apart and matrices in the compute dtype.

    A decode loop over stacked layers slices, and that is to copy, every weight in every step: half its time on a CPU.
    """

    embed: jax.Array  # [V, D]
    layers: tuple[dict[str, jax.Array], ...]
    final_norm: jax.Array
    lm_head: jax.Array | None  # [D, V]; None: the embeddings, as they lie
    config: DecoderConfig = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, decoder: Decoder) -> CachedDecoder:
        """The same numbers; adapters stay apart."""
        stacked, lm_head = decoder.layer_params(), None
        if not decoder.config.tie_embeddings:
            lm_head = decoder.output_weight()
        elif wants_as_it_lies(decoder.dtype):
            lm_head = turned(decoder.output_weight())
        return cls(
            embed=decoder.table().astype(decoder.dtype),
            layers=tuple({n: value[i] for n, value in stacked.items()} for i in range(decoder.config.num_layers)),
            final_norm=decoder.param("final_norm")[...],
            lm_head=lm_head,
            config=decoder.config,
        )

    def shardings(self, mesh: Mesh, split: bool) -> CachedDecoder:
        """Where each parameter goes: over `tensor`; with `split` over `fsdp` too, and each step gathers all of them."""
        return tree_shardings(mesh, self, APART_AXES if split else WHOLE_AXES)

    def extend(
        self,
        cache: KVCache,
        tokens_BC: jax.Array,
        starts_B: jax.Array,
        rows_B: jax.Array | None = None,
        reach: jax.Array | None = None,
    ) -> tuple[KVCache, jax.Array]:
        """Append C tokens to every row, or to rows_B; returns the new cache and their hidden states [B, C, D].

        Row b's tokens take positions starts_B[b] .. starts_B[b] + C - 1. Their keys and values are
        written there; positions >= S are dropped. Each query sees the cache at positions <= its
        own, so whatever lies beyond (an abandoned continuation, a padded tail) is never read
        before it is overwritten. Rows that there are not are read somewhere and written nowhere.
        `reach` is that of `LayerCache.attend`.
        """
        positions_BC = starts_B[:, None] + jnp.arange(tokens_BC.shape[1])
        cos, sin = rope_tables(self.config, positions_BC)
        x, layers = self.embed[tokens_BC], []
        for w, layer in zip(self.layers, cache.layers, strict=True):
            layer, x = _extend_layer(self.config, w, layer, x, cos, sin, positions_BC, rows_B, reach)
            layers.append(layer)
        return KVCache(tuple(layers)), rms_norm(x, self.final_norm, self.config.norm_eps)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Project hidden states [..., D] to float32 logits [..., V]."""
        output = self.embed.T if self.lm_head is None else self.lm_head
        return wide_product(hidden, output)


@functools.partial(jax.jit, static_argnums=0)  # traced once, not for each layer: XLA puts it in place
def _extend_layer(
    config: DecoderConfig,
    w: dict[str, jax.Array],
    cache: LayerCache,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions_BC: jax.Array,
    rows_B: jax.Array | None,
    reach: jax.Array | None,
) -> tuple[LayerCache, jax.Array]:
    q, k, v = qkv(config, w, x, cos, sin)
    cache = cache.write(k, v, positions_BC, rows_B)
    return cache, finish_layer(config, w, x, cache.attend(q, positions_BC, rows_B, reach))

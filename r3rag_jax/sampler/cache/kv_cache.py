"""The KV cache of all layers, and the factory that chooses its layout."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.parallel.shardings import partition_spec
from r3rag_jax.sampler.cache.base import LayerCache
from r3rag_jax.sampler.cache.cpu_kernels import KernelLayerCache
from r3rag_jax.sampler.cache.xla import ACCELERATOR_BLOCKS, CPU_BLOCKS, XLALayerCache
from r3rag_jax.sampler.kernels.cpu.build import KEY_BLOCK
from r3rag_jax.sampler.layout import HeadSlots, Split
from r3rag_jax.sampler.ops import XLA_ON_ONE_CPU, SamplerOps


def default_kv_dtype(compute: jax.typing.DTypeLike, config: DecoderConfig, mesh: Mesh) -> jnp.dtype:
    """KV-cache dtype: the compute dtype, or float32 on CPUs where XLA would upcast the whole cache at every step."""
    ops = SamplerOps.of(mesh)
    is_upcast = ops.target.is_cpu and not (ops.kernels and ops.kernels.can_attend(config.head_dim, compute))
    return jnp.dtype("float32" if is_upcast else compute)


def make_layer_cache(
    config: DecoderConfig, batch: int, slots: int, dtype: jax.typing.DTypeLike, ops: SamplerOps
) -> LayerCache:
    """A zero cache of one layer, `batch` rows of `slots` positions, in the fastest layout for the devices of `ops`."""
    tensor = Split.of(ops.target).tensor
    K, H = HeadSlots(config.num_heads, config.num_kv_heads, tensor).num_slots, config.head_dim
    is_blocked = ops.target.is_cpu and slots % KEY_BLOCK == 0
    T = KEY_BLOCK if is_blocked else slots
    v = jnp.zeros((batch, K, slots, H), dtype)
    k = jnp.zeros((batch, K, slots // T, H, T) if ops.target.is_cpu else v.shape, dtype)
    if is_blocked and ops.kernels is not None and ops.kernels.can_attend(H, dtype):
        return KernelLayerCache(k=k, v=v, kernels=ops.kernels)
    cache = XLALayerCache(k=k, v=v, blocks=CPU_BLOCKS if ops.target.is_cpu else ACCELERATOR_BLOCKS)
    if jnp.dtype(dtype) != jnp.int8:
        return cache
    # Two separate buffers: a donated pytree must not contain the same array twice.
    return dataclasses.replace(cache, k_scale=jnp.zeros((batch, K, slots)), v_scale=jnp.zeros((batch, K, slots)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer."""

    layers: tuple[LayerCache, ...]

    @classmethod
    def init(
        cls,
        config: DecoderConfig,
        batch: int,
        slots: int,
        dtype: jax.typing.DTypeLike,
        ops: SamplerOps = XLA_ON_ONE_CPU,
    ) -> KVCache:
        """A zero cache for `batch` rows of `slots` positions."""
        return cls(tuple(make_layer_cache(config, batch, slots, dtype, ops) for _ in range(config.num_layers)))

    def shardings(self, mesh: Mesh) -> KVCache:
        """Shardings of all arrays: rows over (data, fsdp) if they divide, head slots over tensor, which always do."""
        rest = lambda leaf: ("batch", "kv_heads") + (None,) * (leaf.ndim - 2)  # noqa: E731
        return jax.tree.map(lambda x: NamedSharding(mesh, partition_spec(mesh, rest(x), x.shape)), self)

    @property
    def num_rows(self) -> int:
        """B, the number of rows."""
        return self.layers[0].v.shape[0]

    @property
    def is_read_in_place(self) -> bool:
        """See `LayerCache.is_read_in_place`."""
        return self.layers[0].is_read_in_place

    @property
    def slots(self) -> int:
        """S, the number of positions per row."""
        return self.layers[0].v.shape[2]

    def take(self, rows: jax.Array | None, slots: int | None = None) -> KVCache:
        """Copy a part of the cache.

        Args:
            rows: int32 [R], row indices; None: all rows in order.
            slots: number of leading positions, a multiple of KEY_BLOCK; None: all.
        """
        return KVCache(tuple(layer.take(rows, slots) for layer in self.layers))

    def put(self, rows: jax.Array | None, sub: KVCache) -> KVCache:
        """Write `sub`, a result of `take` for the same rows, back into the cache; rows >= B are not written."""

        def write(whole: jax.Array, update: jax.Array) -> jax.Array:
            if rows is None:
                return jax.lax.dynamic_update_slice(whole, update, (0,) * whole.ndim)
            return whole.at[rows, :, *map(slice, update.shape[2:])].set(update, mode="drop")

        return jax.tree.map(write, self, sub)

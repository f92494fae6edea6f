"""Keys and values of tokens that were read: written at their positions, attended to by later ones.

Shapes: B rows, C new tokens, S positions of the cache, N query heads, K kv heads (N = K * G), H head dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from r3rag_jax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer; position s of a row is that of its token s.

    Keys are stored transposed, so that both matmuls of a decode step run along contiguous memory: on CPU this layout
    takes half the time of [B, S, K, H]. In int8, each key and each value has a scale of its own.
    """

    k: tuple[jax.Array, ...]  # Ly x [B, K, H, S]
    v: tuple[jax.Array, ...]  # Ly x [B, K, S, H]
    k_scale: tuple[jax.Array, ...] = ()  # of int8: Ly x float32 [B, K, S]
    v_scale: tuple[jax.Array, ...] = ()

    @classmethod
    def init(cls, config: DecoderConfig, batch: int, slots: int, dtype: jax.typing.DTypeLike) -> KVCache:
        """Return zeros for `batch` rows of `slots` positions."""
        K, H = config.num_kv_heads, config.head_dim

        def zeros(*shape: int, dtype: jax.typing.DTypeLike = dtype) -> tuple[jax.Array, ...]:
            # Distinct buffers: a donated pytree may not hold one array twice.
            return tuple(jnp.zeros((batch, K, *shape), dtype) for _ in range(config.num_layers))

        cache = cls(k=zeros(H, slots), v=zeros(slots, H))
        if jnp.dtype(dtype) != jnp.int8:
            return cache
        return dataclasses.replace(
            cache, k_scale=zeros(slots, dtype=jnp.float32), v_scale=zeros(slots, dtype=jnp.float32)
        )

    @property
    def slots(self) -> int:
        """S, the number of positions a row can hold."""
        return self.v[0].shape[2]

    def head(self, slots: int) -> KVCache:
        """The first positions of every row."""
        return KVCache(
            k=tuple(k[..., :slots] for k in self.k),
            v=tuple(v[:, :, :slots] for v in self.v),
            k_scale=tuple(scale[..., :slots] for scale in self.k_scale),
            v_scale=tuple(scale[..., :slots] for scale in self.v_scale),
        )

    def with_head(self, sub: KVCache) -> KVCache:
        """This cache with the first positions of every row from `sub`."""

        def write(whole: jax.Array, part: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(whole, part, (0,) * whole.ndim)

        return jax.tree.map(write, self, sub)

    def take(self, rows: jax.Array) -> KVCache:
        """Gather rows (int32 [R]) into a cache of R rows."""
        return jax.tree.map(lambda x: x[rows], self)

    def put(self, rows: jax.Array, sub: KVCache) -> KVCache:
        """Scatter the rows of `sub` to `rows` (int32 [R]); a row index >= B is dropped."""
        return jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), self, sub)

    def write(self, layer: int, k_BCKH: jax.Array, v_BCKH: jax.Array, positions_BC: jax.Array) -> KVCache:
        """Keys and values of a layer at their positions; those at positions >= S are dropped."""
        rows_B1 = jnp.arange(positions_BC.shape[0])[:, None]
        scales = {}
        if self.k_scale:
            (k_BCKH, k_scale), (v_BCKH, v_scale) = quantize(k_BCKH), quantize(v_BCKH)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
                old = getattr(self, name)
                new = old[layer].at[rows_B1, :, positions_BC].set(scale, mode="drop", unique_indices=True)
                scales[name] = _replaced(old, layer, new)
        k, v = self.k[layer], self.v[layer]
        k = k.at[rows_B1, :, :, positions_BC].set(k_BCKH.astype(k.dtype), mode="drop", unique_indices=True)
        v = v.at[rows_B1, :, positions_BC].set(v_BCKH.astype(v.dtype), mode="drop", unique_indices=True)
        return dataclasses.replace(self, k=_replaced(self.k, layer, k), v=_replaced(self.v, layer, v), **scales)

    def attend(self, layer: int, q_BCNH: jax.Array, positions_BC: jax.Array) -> jax.Array:
        """Attend to positions of a layer up to each query's own; returns [B, C, N, H] of the queries' type.

        The G query heads of a kv head and the C tokens are laid out as rows R of one matmul, so the cache is read
        once; left to an einsum over all the axes, XLA's CPU backend takes 5 x as long (a decode step of 64 rows).
        """
        k_BKHS, v_BKSH = self.k[layer], self.v[layer]
        if self.k_scale:
            k_BKHS, v_BKSH = k_BKHS.astype(q_BCNH.dtype), v_BKSH.astype(q_BCNH.dtype)
        B, C, N, H = q_BCNH.shape
        K, S = k_BKHS.shape[1], k_BKHS.shape[3]
        G = N // K
        q_BKRH = q_BCNH.reshape(B, C, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * C, H)
        scores = _einsum32("bkrh,bkhs->bkrs", q_BKRH.astype(k_BKHS.dtype), k_BKHS)
        if self.k_scale:
            scores = scores * self.k_scale[layer][:, :, None]
        mask = jnp.arange(S) <= positions_BC[:, :, None]
        scores = jnp.where(mask[:, None, None], scores.reshape(B, K, G, C, S) * H**-0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).reshape(B, K, G * C, S)
        if self.v_scale:
            weights = weights * self.v_scale[layer][:, :, None]
        out = _einsum32("bkrs,bksh->bkrh", weights.astype(v_BKSH.dtype), v_BKSH)
        return out.reshape(B, K, G, C, H).transpose(0, 3, 1, 2, 4).reshape(B, C, N, H).astype(q_BCNH.dtype)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., H] as int8 times a scale, float32 [...]: the largest of each H has 127; zeros stay zeros."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8), scale


def _replaced(arrays: tuple[jax.Array, ...], place: int, new: jax.Array) -> tuple[jax.Array, ...]:
    return (*arrays[:place], new, *arrays[place + 1 :])


def _einsum32(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Contract two arrays of one dtype into float32.

    XLA's CPU backend (seen in jaxlib 0.10.2) cannot run a bfloat16 product of two batch dimensions with a
    float32 result ("Unsupported element type for DotThunk"); there the inputs are widened first.
    """

    def native(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

    def widened(x: jax.Array, y: jax.Array) -> jax.Array:
        return native(x.astype(jnp.float32), y.astype(jnp.float32))

    return jax.lax.platform_dependent(x, y, cpu=widened, default=native)

"""One decoder for Llama-3.x, Qwen2.5, Qwen3 and SmolLM2: its parameters, its layers and the training forward.

Shapes: B rows, L tokens, D width, N query heads, K kv heads, G = N / K, H head dim, F feed-forward width, V vocab,
Ly layers. Left out on purpose: dropout, sliding windows, biases on the output projection (no supported checkpoint
has them). The forward with a KV cache is in `sampler/cached_decoder.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r3rag_jax.models.attention import IMPLEMENTATIONS, SAVED, attention
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.matmul import adapted_matmul, matmul
from r3rag_jax.models.params import PARAM_AXES, param_shapes
from r3rag_jax.models.shards import (
    config_of_shard,
    embeddings_of_shard,
    layer_of_shard,
    output_of_shard,
    whole_of_shard,
)
from r3rag_jax.parallel.collectives import Dims, shared_over_tensor, sum_over_tensor
from r3rag_jax.parallel.target import ONE_CPU, Target


def _all_but_gathered(prim: Any, *_: Any, **__: Any) -> bool:
    """Remat policy "none" where layers are gathered: the gathered weights of all layers would not fit."""
    return prim.name != "all_gather"


_REMAT_POLICIES: dict[str, Callable[..., bool]] = {
    "none": _all_but_gathered,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED),
    ),
}


class Layers(nnx.Module):
    """Parameters of all layers, each stacked along a leading axis of length Ly."""

    def __init__(self, params: dict[str, jax.Array]):
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))


class Decoder(nnx.Module):
    """A pre-norm decoder: RoPE, grouped-query attention, gated SiLU feed-forward."""

    embed_rows: nnx.Param  # [T, D], set by `lora.attach`
    head_rows: nnx.Param  # [T, D], set by `lora.attach`

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        dtype: jax.typing.DTypeLike = jnp.float32,
        attention_implementation: str = "xla",
    ):
        """Initialise parameters: normal with variance 1 / fan-in, norm scales one, biases zero.

        Projections that write to the residual stream are smaller by sqrt(2 Ly), so that its variance does not grow with
        depth. (A fixed standard deviation of 0.02, common for large models, gives nearly uniform attention at width
        128, and the model learns late to copy.)

        Args:
            rngs: its `params` stream is used.
            param_dtype: of the stored parameters.
            dtype: of matmul inputs; norms, softmax and matmul accumulation are float32.
            attention_implementation: see `attention.attention`.

        Raises:
            ValueError: the attention implementation is unknown.
        """
        if attention_implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"attention_implementation must be one of {IMPLEMENTATIONS}; got {attention_implementation!r}"
            )
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.attention_implementation = attention_implementation
        self.adapter_scale = 0.0  # alpha / rank of the adapters, set by `lora.attach`
        self.adapter_tokens: tuple[int, ...] = ()  # token ids of `embed_rows` and `head_rows`

        def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
            if name.endswith("_norm"):
                return jnp.ones(shape, param_dtype)
            if name.endswith("_bias"):
                return jnp.zeros(shape, param_dtype)
            return (init_std(name) * jax.random.normal(rngs.params(), shape)).astype(param_dtype)

        def init_std(name: str) -> float:
            fan_in = config.hidden_size if name == "embed" else param_shapes(config)[name][-2]
            is_residual = name in ("o_proj", "down_proj")
            return (fan_in * (2 * config.num_layers if is_residual else 1)) ** -0.5

        params = {name: draw(name, shape) for name, shape in param_shapes(config).items()}
        stacked = {n: params.pop(n) for n in list(params) if PARAM_AXES[n][0] == "layers"}
        self.layers = Layers(stacked)
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array | None = None,
        branch_ids_BL: jax.Array | None = None,
        *,
        remat: str = "none",
        target: Target = ONE_CPU,
    ) -> jax.Array:
        """Return the hidden states after the final norm, [B, L, D] of the compute dtype.

        Args:
            tokens_BL, positions_BL: int32; positions are used by RoPE only, causality follows the order in the row.
            segment_ids_BL, branch_ids_BL: int32, what a token sees; see `attention.attention`.
            remat: "none", "full" (save only the layer inputs) or "dots" (save the outputs of projections and of
                attention).
            target: the devices to compile for. On several devices this is called under `collectives.per_device`, with
                a device's rows, its shards of the parameters and `Target.shard`.

        Raises:
            ValueError: `remat` is unknown.
        """
        if remat not in _REMAT_POLICIES:
            raise ValueError(f"remat must be one of {[*_REMAT_POLICIES]}; got {remat!r}")
        cos, sin = rope_tables(self.config, positions_BL)
        config = config_of_shard(self.config, target)

        def body(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            # Inside the scan, so that only one layer's gathered and cast copy exists at a time.
            w = self._prepared(layer_of_shard(self.config, w, self.dtype, target))
            q, k, v = qkv(config, w, x, cos, sin, target)
            out = attention(
                q, k, v, segment_ids_BL, branch_ids_BL, implementation=self.attention_implementation, target=target
            )
            return finish_layer(config, w, x, out, target), None

        if remat != "none" or target.is_shard:
            body = jax.checkpoint(body, policy=_REMAT_POLICIES[remat], prevent_cse=False)
        x, _ = jax.lax.scan(body, self._embedded(tokens_BL, target), self._stacked())
        return rms_norm(x, self.param("final_norm")[...], self.config.norm_eps, target)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Project hidden states [..., D] to float32 logits [..., V]."""
        weight = self.output_weight()
        weight = weight.T if self.config.tie_embeddings else weight
        return jnp.matmul(hidden, weight, preferred_element_type=jnp.float32)

    def output_shard(self, target: Target) -> tuple[jax.Array, Dims]:
        """Return the output layer as a device stores it, and the dimensions that it has a shard of.

        With adapters, which are added to the whole, and on one device it is `output_weight`.
        """
        if not target.is_shard or self.adapter_tokens:
            return self.output_weight(target), ()
        name = "embed" if self.config.tie_embeddings else "lm_head"
        return output_of_shard(self.config, name, self.param(name)[...], target)

    def output_weight(self, target: Target = ONE_CPU) -> jax.Array:
        """Return the output layer in the compute dtype, whole: [D, V], or the embeddings [V, D] if they are tied."""
        if self.config.tie_embeddings:
            table = whole_of_shard(self.config, "embed", self.param("embed")[...], self.dtype, target)
            return self._with_rows(table, target).astype(self.dtype)
        weight = whole_of_shard(self.config, "lm_head", self.param("lm_head")[...], self.dtype, target)
        if self.adapter_tokens:
            rows = whole_of_shard(self.config, "head_rows", self.head_rows[...], self.head_rows[...].dtype, target)
            weight = weight.at[:, jnp.asarray(self.adapter_tokens)].add(rows.T.astype(weight.dtype))
        return weight.astype(self.dtype)

    def param(self, name: str) -> nnx.Param:
        """Return the parameter with this name in PARAM_AXES, from the layer stack or the model itself."""
        owner = self.layers if PARAM_AXES[name][0] == "layers" else self
        return getattr(owner, name)

    def table(self) -> jax.Array:
        """Return the embeddings [V, D], with `embed_rows` added to the rows of `adapter_tokens`."""
        return self._with_rows(self.param("embed")[...], ONE_CPU)

    def _with_rows(self, table: jax.Array, target: Target) -> jax.Array:
        if not self.adapter_tokens:
            return table
        rows = whole_of_shard(self.config, "embed_rows", self.embed_rows[...], self.embed_rows[...].dtype, target)
        return table.at[jnp.asarray(self.adapter_tokens)].add(rows.astype(table.dtype))

    def _embedded(self, tokens_BL: jax.Array, target: Target) -> jax.Array:
        """The embeddings of tokens, [B, L, D] of the compute dtype."""
        if not target.is_shard:
            return self.table()[tokens_BL].astype(self.dtype)
        x = embeddings_of_shard(self.config, self.param("embed")[...], tokens_BL, self.dtype, target)
        if not self.adapter_tokens:
            return x
        rows = self.embed_rows[...]
        rows = whole_of_shard(self.config, "embed_rows", rows, rows.dtype, target, is_used_alike=True)
        is_token = tokens_BL[..., None] == jnp.asarray(self.adapter_tokens)
        return x + jnp.matmul(is_token.astype(rows.dtype), rows).astype(x.dtype)

    def layer_params(self) -> dict[str, jax.Array]:
        """Return name -> stacked layer parameter, cast to the compute dtype except norms; adapters are scaled."""
        return self._prepared(self._stacked())

    def _stacked(self) -> dict[str, jax.Array]:
        return {name: param[...] for name, param in vars(self.layers).items() if isinstance(param, nnx.Param)}

    def _prepared(self, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Cast and scale the parameters of one layer or of a stack of layers."""

        def one(name: str, value: jax.Array) -> jax.Array:
            if name.endswith("_norm"):
                return value
            return (self.adapter_scale * value if name.endswith("_b") else value).astype(self.dtype)

        return {name: one(name, value) for name, value in params.items()}


def qkv(
    config: DecoderConfig, w: dict[str, jax.Array], x: jax.Array, cos: jax.Array, sin: jax.Array, target: Target
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return queries [B, L, N, H], keys and values [B, L, K, H] of a layer with parameters `w`, after RoPE."""
    h = shared_over_tensor(rms_norm(x, w["input_norm"], config.norm_eps, target), target)

    def heads(name: str, num: int) -> jax.Array:
        y = _project(w, f"{name}_proj", h, target)
        if config.attention_bias:
            y = y + w[f"{name}_bias"]
        return y.reshape(*y.shape[:-1], num, config.head_dim)

    q, k, v = heads("q", config.num_heads), heads("k", config.num_kv_heads), heads("v", config.num_kv_heads)
    return *norm_and_rope(config, w, q, k, cos, sin, target), v


def norm_and_rope(
    config: DecoderConfig,
    w: dict[str, jax.Array],
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    target: Target,
) -> tuple[jax.Array, jax.Array]:
    """Apply RMSNorm to each head of q and k if the model has it (Qwen3), then RoPE."""
    if config.qk_norm:
        q = rms_norm(q, w["q_norm"], config.norm_eps, target)
        k = rms_norm(k, w["k_norm"], config.norm_eps, target)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def finish_layer(
    config: DecoderConfig, w: dict[str, jax.Array], x: jax.Array, out: jax.Array, target: Target
) -> jax.Array:
    """Add the projected attention output [B, L, N, H] and the feed-forward layer to the residual stream [B, L, D]."""
    x = x + sum_over_tensor(_project(w, "o_proj", out.reshape(*out.shape[:-2], -1), target), target)
    h = shared_over_tensor(rms_norm(x, w["post_norm"], config.norm_eps, target), target)
    gated = jax.nn.silu(_project(w, "gate_proj", h, target)) * _project(w, "up_proj", h, target)
    return x + sum_over_tensor(_project(w, "down_proj", gated, target), target)


def _project(w: dict[str, jax.Array], name: str, x: jax.Array, target: Target) -> jax.Array:
    """Multiply by a projection of the layer, with its adapter if there is one."""
    if f"{name}_a" not in w:
        return matmul(x, w[name], target)
    return adapted_matmul(x, w[name], w[f"{name}_a"], w[f"{name}_b"], target)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, target: Target) -> jax.Array:
    """Return x / sqrt(mean(x^2) + eps) * scale in float32, last axis (arXiv:1910.07467).

    On one device it has a custom backward pass; on several devices it uses autodiff, see `matmul.matmul`.
    """
    return _rms_norm(x, scale, eps) if target.is_one_device else _normalized(x, scale, eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm with a backward pass that computes its sums over tokens and over the width as matrix-vector products.

    On XLA's CPU backend the sums of autodiff take fifteen times as long, which is a tenth of a training step.
    """
    return _normalized(x, scale, eps)


def _normalized(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * _inverse_root(y, eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def _inverse_root(x: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def _rms_norm_forward(x: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _normalized(x, scale, eps), (x, scale)


def _rms_norm_backward(eps: float, saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale = saved
    y, grad, wide = x.astype(jnp.float32), grad.astype(jnp.float32), scale.astype(jnp.float32)
    root, product = _inverse_root(y, eps), grad * y
    exact = functools.partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)
    along = exact(product, wide, 1)[..., None] / x.shape[-1]
    grad_x = root * (grad * wide - y * (jnp.square(root) * along))
    grad_scale = exact(root[..., 0], product, x.ndim - 1)
    return grad_x.astype(x.dtype), grad_scale.astype(scale.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Return the float32 [H / 2] rotary frequencies theta^(-2i/H), with llama3 scaling if the config has it.

    Llama-3.1 divides the low frequencies (wavelength > original / low_freq_factor) by `factor`,
    keeps the high ones (wavelength < original / high_freq_factor) and blends linearly in between.
    """
    freqs = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling is not None:
        s = config.rope_scaling
        turns = s.original_max_position_embeddings * freqs / (2 * math.pi)
        blend = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        freqs = blend * freqs + (1 - blend) * freqs / s.factor
    return freqs.astype(np.float32)


def rope_tables(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin of the RoPE angles of positions [...], float32 [..., 1, H / 2] (arXiv:2104.09864)."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Apply RoPE to x [..., heads, H]: rotate the pairs (x[i], x[i + H/2]), as Hugging Face models do."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

"""The text encoder of the BERT family (arXiv:1810.04805): MiniLM, E5, BGE, from a Hugging Face directory.

Shapes: B rows, L tokens, D width, N heads, H = D / N, F feed-forward width, V vocab, P positions, T token
types, Ly layers. Left out on purpose: dropout, text pairs (every token has type 0), the pooler and the
pre-training heads. Embeddings need none of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r3rag_jax.models.fields import MAX_LAYERS, get_number, get_size
from r3rag_jax.models.hf.tensor_files import TensorFiles, check_tensors, read_config, read_param, tensor_shapes

POOLINGS = ("mean", "cls")

# Our parameter name -> Hugging Face name, where {i} is the layer. The files hold `*_proj` transposed, as [out, in].
HF_NAMES = {
    "word_embed": "embeddings.word_embeddings.weight",
    "position_embed": "embeddings.position_embeddings.weight",
    "type_embed": "embeddings.token_type_embeddings.weight",
    "embed_norm_scale": "embeddings.LayerNorm.weight",
    "embed_norm_bias": "embeddings.LayerNorm.bias",
    "q_proj": "encoder.layer.{i}.attention.self.query.weight",
    "q_bias": "encoder.layer.{i}.attention.self.query.bias",
    "k_proj": "encoder.layer.{i}.attention.self.key.weight",
    "k_bias": "encoder.layer.{i}.attention.self.key.bias",
    "v_proj": "encoder.layer.{i}.attention.self.value.weight",
    "v_bias": "encoder.layer.{i}.attention.self.value.bias",
    "o_proj": "encoder.layer.{i}.attention.output.dense.weight",
    "o_bias": "encoder.layer.{i}.attention.output.dense.bias",
    "attention_norm_scale": "encoder.layer.{i}.attention.output.LayerNorm.weight",
    "attention_norm_bias": "encoder.layer.{i}.attention.output.LayerNorm.bias",
    "up_proj": "encoder.layer.{i}.intermediate.dense.weight",
    "up_bias": "encoder.layer.{i}.intermediate.dense.bias",
    "down_proj": "encoder.layer.{i}.output.dense.weight",
    "down_bias": "encoder.layer.{i}.output.dense.bias",
    "ffn_norm_scale": "encoder.layer.{i}.output.LayerNorm.weight",
    "ffn_norm_bias": "encoder.layer.{i}.output.LayerNorm.bias",
}
_LAYER_PARAMS = tuple(name for name, hf_name in HF_NAMES.items() if "{i}" in hf_name)
_OLD_NAMES = {
    "LayerNorm.weight": "LayerNorm.gamma",
    "LayerNorm.bias": "LayerNorm.beta",
}  # names in files converted from TensorFlow
_PREFIX = "bert."  # name prefix of the encoder's tensors in models with a head (BertForMaskedLM, …)
_IGNORED = ("pooler.", "embeddings.position_ids")  # name prefixes of tensors that are not read
# The only supported values of these config.json fields; they are also the defaults of transformers.
_ONLY = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Hyperparameters of an encoder."""

    vocab_size: int  # V, rows of the embedding table
    hidden_size: int  # D, width of the residual stream and of the embeddings
    num_layers: int  # Ly
    num_heads: int  # N; divides hidden_size
    ffn_size: int  # F, width of the feed-forward layer
    max_positions: int  # P, longest text, in tokens
    num_types: int = 2  # T, token types
    norm_eps: float = 1e-12  # added to the variance in LayerNorm

    def __post_init__(self) -> None:
        """Check the relations between the fields.

        Raises:
            ValueError: a relation does not hold.
        """
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size", "max_positions", "num_types"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size must be divisible by num_heads {self.num_heads}; got {self.hidden_size}")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> BertConfig:
        """Read the dictionary of a Hugging Face `config.json`.

        Raises:
            ValueError: a size is missing, or a value is not supported by this encoder (the message names the field).
        """
        if hf.get("model_type") != "bert":
            raise ValueError(f"model_type must be 'bert'; got {hf.get('model_type')!r}")
        for key, value in _ONLY.items():
            if hf.get(key, value) != value:
                raise ValueError(f"{key} must be {value!r}; got {hf[key]!r}")
        return cls(
            vocab_size=get_size(hf, "vocab_size"),
            hidden_size=get_size(hf, "hidden_size"),
            num_layers=get_size(hf, "num_hidden_layers", at_most=MAX_LAYERS),
            num_heads=get_size(hf, "num_attention_heads"),
            ffn_size=get_size(hf, "intermediate_size"),
            max_positions=get_size(hf, "max_position_embeddings"),
            num_types=get_size(hf, "type_vocab_size", cls.num_types),
            norm_eps=get_number(hf, "layer_norm_eps", cls.norm_eps),
        )


def param_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every parameter; stacked layer parameters have a leading axis Ly."""
    Ly, D, F = config.num_layers, config.hidden_size, config.ffn_size
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(HF_NAMES, (D,)) | dict.fromkeys(_LAYER_PARAMS, (Ly, D))
    shapes |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (Ly, D, D))
    return shapes | {
        "word_embed": (config.vocab_size, D),
        "position_embed": (config.max_positions, D),
        "type_embed": (config.num_types, D),
        "up_proj": (Ly, D, F),
        "up_bias": (Ly, F),
        "down_proj": (Ly, F, D),
    }


class Bert(nnx.Module):
    """A post-norm encoder: learned position embeddings, bidirectional attention, GELU feed-forward."""

    def __init__(self, config: BertConfig, params: Mapping[str, jax.Array], *, dtype: jax.typing.DTypeLike):
        """Build an encoder from its parameters.

        Args:
            params: name -> array, with the names and shapes of `param_shapes(config)`.
            dtype: of matmul inputs; norms, softmax and accumulation are float32. float32 matmuls run at full
                precision, also on devices that round their inputs by default (TPU, TF32 on NVIDIA).
        """
        self.config = config
        self.dtype = jnp.dtype(dtype)
        for name in HF_NAMES:
            setattr(self, name, nnx.Param(params[name]))

    def __call__(self, tokens_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
        """Return the hidden states of the last layer, [B, L, D] of the compute dtype.

        Positions count the kept tokens of a row, so the states of a text do not depend on where padding is.

        Args:
            tokens_BL: int32 ids.
            mask_BL: bool, True = keep. Padding may be anywhere: it is not attended to, and its states are finite but
                undefined.
        """
        positions_BL = jnp.maximum(jnp.cumsum(mask_BL, axis=1) - 1, 0)
        x = self.param("word_embed")[tokens_BL] + self.param("type_embed")[0]
        x = x + self.param("position_embed")[positions_BL]
        x = layer_norm(x, self.param("embed_norm_scale"), self.param("embed_norm_bias"), self.config.norm_eps)

        def body(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            return self._layer(w, x, mask_BL), None

        x, _ = jax.lax.scan(body, x.astype(self.dtype), {name: self.param(name) for name in _LAYER_PARAMS})
        return x

    def param(self, name: str) -> jax.Array:
        """Return a parameter by its name in HF_NAMES."""
        return getattr(self, name)[...]

    def _layer(self, w: dict[str, jax.Array], x: jax.Array, mask_BL: jax.Array) -> jax.Array:
        """One layer, [B, L, D] -> [B, L, D]: attention, add and norm, feed-forward, add and norm."""
        eps = self.config.norm_eps
        q, k, v = (self._dense(x, w[f"{name}_proj"], w[f"{name}_bias"]).astype(self.dtype) for name in "qkv")
        out = self._dense(self._attend(q, k, v, mask_BL), w["o_proj"], w["o_bias"])
        x = layer_norm(x + out, w["attention_norm_scale"], w["attention_norm_bias"], eps).astype(self.dtype)
        inner = jax.nn.gelu(self._dense(x, w["up_proj"], w["up_bias"]), approximate=False).astype(self.dtype)
        out = self._dense(inner, w["down_proj"], w["down_bias"])
        return layer_norm(x + out, w["ffn_norm_scale"], w["ffn_norm_bias"], eps).astype(self.dtype)

    def _attend(self, q_BLD: jax.Array, k_BLD: jax.Array, v_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
        """Attention from every token to the kept tokens of its row; returns [B, L, D]."""
        B, L, D = q_BLD.shape
        N, H = self.config.num_heads, D // self.config.num_heads
        # One batch axis: XLA's CPU backend cannot run a bfloat16 matmul with two batch axes and a float32 result.
        q, k, v = (x.reshape(B, L, N, H).swapaxes(1, 2).reshape(B * N, L, H) for x in (q_BLD, k_BLD, v_BLD))
        scores = self._matmul(q, k.swapaxes(1, 2)).reshape(B, N, L, L) * H**-0.5
        # Not -inf, with which a row without kept tokens would become NaN.
        scores = jnp.where(mask_BL[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        out = self._matmul(weights.reshape(B * N, L, L), v).astype(self.dtype)
        return out.reshape(B, N, L, H).swapaxes(1, 2).reshape(B, L, D)

    def _dense(self, x: jax.Array, w: jax.Array, bias: jax.Array) -> jax.Array:
        """x @ w + bias in float32."""
        return self._matmul(x, w.astype(self.dtype)) + bias.astype(jnp.float32)

    def _matmul(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """x @ y in float32 for arrays of the compute dtype."""
        precision = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        return jnp.matmul(x, y, precision=precision, preferred_element_type=jnp.float32)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Return (x - mean) / sqrt(variance + eps) * scale + bias over the last axis, float32 (arXiv:1607.06450)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y * scale.astype(jnp.float32) + bias.astype(jnp.float32)


def pool(hidden_BLD: jax.Array, mask_BL: jax.Array, pooling: str) -> jax.Array:
    """Return one vector per row, float32 [B, D]; 0 for a row without any kept token.

    Args:
        hidden_BLD: hidden states of the last layer. mask_BL: bool, True = keep.
        pooling: "mean" of the kept tokens, special ones included, or "cls", the first kept token.

    Raises:
        ValueError: `pooling` is unknown.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {POOLINGS}; got {pooling!r}")
    kept_BL = mask_BL if pooling == "mean" else mask_BL & (jnp.cumsum(mask_BL, axis=1) == 1)
    total_BD = jnp.sum(jnp.where(kept_BL[:, :, None], hidden_BLD.astype(jnp.float32), 0.0), axis=1)
    return total_BD / jnp.maximum(jnp.sum(kept_BL, axis=1, keepdims=True), 1)


def unit(vectors_BD: jax.Array) -> jax.Array:
    """Return the vectors divided by their L2 norms; 0 stays 0."""
    return vectors_BD / jnp.maximum(jnp.linalg.norm(vectors_BD, axis=-1, keepdims=True), 1e-12)


def load_config(path: str | Path) -> BertConfig:
    """Read `config.json` of a Hugging Face directory.

    Raises:
        FileNotFoundError: the directory has no config.json.
        ValueError: the model is not supported by this encoder (the message names the field).
    """
    return read_config(path, BertConfig.from_hf)


def load_encoder(path: str | Path, *, dtype: jax.typing.DTypeLike = jnp.float32) -> Bert:
    """Load an encoder from a Hugging Face directory to the default device.

    Args:
        path: holds config.json and model.safetensors, or model.safetensors.index.json with its shards.
            Tensor names are those of BertModel, or of a model with a head, which have the prefix `bert.`;
            the head is not read. Norms may be named weight and bias, or gamma and beta as in older exports.
        dtype: of the matrices and of matmul inputs; embeddings, norms and biases are float32.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a tensor is missing, unexpected or of another shape (named, with file and both shapes).
    """
    config = load_config(path)
    shapes = param_shapes(config)
    with TensorFiles(path) as files:
        prefix = _PREFIX if any(name.startswith(_PREFIX) for name in files.file_of) else ""
        is_old = any(name.endswith(tuple(_OLD_NAMES.values())) for name in files.file_of)
        names = {name: prefix + (_old_name(hf_name) if is_old else hf_name) for name, hf_name in HF_NAMES.items()}
        expected: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            expected |= tensor_shapes(names[name], shape, transposed=name.endswith("_proj"))
        ignored = tuple(prefix + name for name in _IGNORED)
        found = {name for name in files.file_of if name.startswith(prefix) and not name.startswith(ignored)}
        check_tensors(files, expected, found, f"a bert with {config.num_layers} layers")
        params = {}
        for name, shape in shapes.items():
            is_matrix = name.endswith("_proj")
            param_dtype = np.dtype(dtype if is_matrix else np.float32)
            params[name] = read_param(files, names[name], shape, param_dtype, transposed=is_matrix)
    return Bert(config, params, dtype=dtype)


def _old_name(hf_name: str) -> str:
    """Return the Hugging Face name as older exports spell it: LayerNorm.gamma, LayerNorm.beta."""
    for new, old in _OLD_NAMES.items():
        hf_name = hf_name.replace(new, old)
    return hf_name

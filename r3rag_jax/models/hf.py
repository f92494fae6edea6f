"""Decoders in Hugging Face directories: `config.json` with one or several safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import Decoder, param_shapes
from r3rag_jax.models.tensor_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    TensorFiles,
    check_names,
    read_config,
    read_param,
    tensor_names,
)

# Our parameter name -> Hugging Face name; {i} is the layer. Every two-dimensional layer tensor is
# transposed.
HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "input_norm": "model.layers.{i}.input_layernorm.weight",
    "q_proj": "model.layers.{i}.self_attn.q_proj.weight",
    "k_proj": "model.layers.{i}.self_attn.k_proj.weight",
    "v_proj": "model.layers.{i}.self_attn.v_proj.weight",
    "q_bias": "model.layers.{i}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{i}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{i}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{i}.self_attn.k_norm.weight",
    "o_proj": "model.layers.{i}.self_attn.o_proj.weight",
    "post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "gate_proj": "model.layers.{i}.mlp.gate_proj.weight",
    "up_proj": "model.layers.{i}.mlp.up_proj.weight",
    "down_proj": "model.layers.{i}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_TRANSPOSED = frozenset(name for name in HF_NAMES if name.endswith("_proj")) | {"lm_head"}
# Tensors that older exports carry and that hold nothing a config does not say.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
_EXPORT_DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def load_config(path: str | Path) -> DecoderConfig:
    """Read `config.json` of a Hugging Face directory.

    Raises:
        FileNotFoundError: the directory has no config.json.
        ValueError: the model is not one this package computes (the message names the field).
    """
    return read_config(path, DecoderConfig.from_hf)


def load_decoder(
    path: str | Path,
    *,
    dtype: jax.typing.DTypeLike,
    param_dtype: jax.typing.DTypeLike | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | Callable[[str], Any] | None = None,
    attention_implementation: str = "xla",
) -> Decoder:
    """Read a decoder from a Hugging Face directory.

    Args:
        path: holds config.json and model.safetensors, or model.safetensors.index.json with its
            shards.
        dtype: compute dtype. param_dtype: of the stored parameters; `dtype` when None.
        shardings: parameter name -> sharding, as a mapping or a function. With a sharding, each
            device is given its own slice only; None puts everything on the default device.
        attention_implementation: see attention.py.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a tensor is missing, unexpected or of another shape (named, with file and both
            shapes).
    """
    config = load_config(path)
    model = nnx.eval_shape(
        lambda: Decoder(
            config,
            rngs=nnx.Rngs(0),
            param_dtype=dtype if param_dtype is None else param_dtype,
            dtype=dtype,
            attention_implementation=attention_implementation,
        )
    )
    sharding_of = shardings.get if isinstance(shardings, Mapping) else shardings
    with TensorFiles(path) as files:
        _check_names(config, files)
        for name, shape in param_shapes(config).items():
            param = model.param(name)
            dtype_of_param = np.dtype(param.get_value().dtype)
            array = read_param(files, HF_NAMES[name], shape, dtype_of_param, transposed=name in _TRANSPOSED)
            sharding = sharding_of(name) if sharding_of is not None else None
            param.set_value(_place(array, sharding))
    return model


def save_decoder(decoder: Decoder, path: str | Path, *, dtype: str = "bfloat16") -> None:
    """Write config.json and model.safetensors, as transformers reads them, into directory `path`.

    Args:
        decoder: its parameters may be sharded over the devices of this process.
        dtype: "bfloat16" or "float32".

    Raises:
        ValueError: the dtype is another, or a parameter lies partly on devices of other processes.
    """
    if dtype not in _EXPORT_DTYPES:
        raise ValueError(f"dtype must be one of {sorted(_EXPORT_DTYPES)}; got {dtype!r}")
    tensors = {name: np.ascontiguousarray(array.astype(_EXPORT_DTYPES[dtype])) for name, array in hf_tensors(decoder)}
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
    config = json.dumps(decoder.config.to_hf(torch_dtype=dtype), indent=2)
    (path / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")


def hf_tensors(decoder: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (Hugging Face name, array in Hugging Face layout) for every tensor of the decoder.

    Raises:
        ValueError: a parameter lies partly on devices of other processes.
    """
    for name in param_shapes(decoder.config):
        value = decoder.param(name).get_value()
        if not value.is_fully_addressable:
            raise ValueError(f"export needs every shard in this process; {name} has remote shards")
        array = np.asarray(value)
        stack = array if "{i}" in HF_NAMES[name] else array[None]
        for i, tensor in enumerate(stack):
            yield HF_NAMES[name].format(i=i), tensor.T if name in _TRANSPOSED else tensor


def _check_names(config: DecoderConfig, files: TensorFiles) -> None:
    """Compare the tensors of the files with the ones the config asks for.

    Raises:
        ValueError: one is missing, or one is there that the decoder would not use.
    """
    expected = {n for name in param_shapes(config) for n in tensor_names(HF_NAMES[name], config.num_layers)}
    found = {name for name in files.file_of if not name.endswith(_IGNORED_SUFFIXES)}
    if config.tie_embeddings:
        found.discard(HF_NAMES["lm_head"])  # some exports repeat the tied table
    check_names(files, expected, found, f"a {config.model_type} with {config.num_layers} layers")


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Put a host array on devices; with a sharding, each device receives its slice only."""
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

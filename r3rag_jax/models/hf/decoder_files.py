"""Loads and saves decoders in Hugging Face directories: `config.json` and one or several safetensors files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from r3rag_jax.errors import UserError
from r3rag_jax.json_text import read_json_object
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import Decoder, param_shapes
from r3rag_jax.models.hf.tensor_files import (
    CONFIG_FILE,
    MAX_FILE_BYTES,
    Shape,
    TensorFiles,
    check_tensors,
    read_config,
    read_param,
    tensor_shapes,
    write_dtype,
    write_tensors,
)
from r3rag_jax.run.files import write_json
from r3rag_jax.text.tokenizer import GENERATION_FILE, Tokenizer

TOKEN_IDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)  # fields of generation_config.json that config.json repeats

# Our parameter name -> Hugging Face name, where {i} is the layer.
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
# Parameters that the files hold transposed, as [out, in].
_TRANSPOSED = frozenset(name for name in HF_NAMES if name.endswith("_proj")) | {"lm_head"}
# Suffixes of tensors in older exports that are derived from the config; they are not read.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


class HFTensor(NamedTuple):
    """A tensor of the files and the parameter, or the layer of a stacked parameter, that it holds."""

    param: str  # name in `param_shapes`
    layer: int | None  # index into a stacked parameter; None: not stacked
    shape: Shape  # in the file


def hf_tensors(config: DecoderConfig) -> dict[str, HFTensor]:
    """Return Hugging Face name -> tensor of a decoder, in the order embeddings, layers, final norm and head."""
    tensors: dict[str, HFTensor] = {}
    for name, shape in param_shapes(config).items():
        shapes = tensor_shapes(HF_NAMES[name], shape, transposed=name in _TRANSPOSED)
        for i, (hf_name, one) in enumerate(shapes.items()):
            tensors[hf_name] = HFTensor(name, i if "{i}" in HF_NAMES[name] else None, one)

    def layer_order(item: tuple[str, HFTensor]) -> int:
        _, tensor = item
        return tensor.layer if tensor.layer is not None else -1 if tensor.param == "embed" else config.num_layers

    return dict(sorted(tensors.items(), key=layer_order))


def load_config(path: str | Path) -> DecoderConfig:
    """Read `config.json` of a Hugging Face directory.

    Raises:
        FileNotFoundError: the directory has no config.json.
        ValueError: the model is not supported (the message names the field).
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
    """Load a decoder from a Hugging Face directory, one slice at a time (see `read_param`).

    Args:
        path: holds config.json and model.safetensors, or model.safetensors.index.json with its
            shards.
        dtype: compute dtype. param_dtype: of the stored parameters; `dtype` when None.
        shardings: parameter name -> sharding, as a mapping or a function. Each process reads only the
            slices of its devices. None: everything goes to the default device.
        attention_implementation: see attention.py.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a tensor is missing, unexpected, cut off or of another shape (named, with file and
            both shapes).
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
        check_decoder(config, files)
        for name, shape in param_shapes(config).items():
            param = model.param(name)
            dtype_of_param = np.dtype(param.get_value().dtype)
            sharding = sharding_of(name) if sharding_of is not None else None
            is_transposed = name in _TRANSPOSED
            param.set_value(
                read_param(files, HF_NAMES[name], shape, dtype_of_param, transposed=is_transposed, sharding=sharding)
            )
    return model


def check_decoder(config: DecoderConfig, files: TensorFiles) -> None:
    """Check names, shapes and dtypes of the tensors in the files against the config, without reading data.

    Raises:
        FileNotFoundError: a shard named by the index is missing.
        ValueError: a tensor is missing, unexpected, cut off or of another shape.
    """
    expected = {hf_name: tensor.shape for hf_name, tensor in hf_tensors(config).items()}
    found = {name for name in files.file_of if not name.endswith(_IGNORED_SUFFIXES)}
    if config.tie_embeddings:
        found.discard(HF_NAMES["lm_head"])  # some exports store the tied table twice
    check_tensors(files, expected, found, f"a {config.model_type} with {config.num_layers} layers")


def check_vocabulary(config: DecoderConfig, tokenizer: Tokenizer, path: str | Path) -> None:
    """Check that the embedding table has a row for every id of the tokenizer; XLA reads a row that there is not as the
    last one, without an error.

    Raises:
        UserError: the tokenizer has larger ids.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the model at {path} cannot be read: the tokenizer must have ids below {config.vocab_size}, the number of "
            f"rows of the embedding table; it has ids up to {tokenizer.vocab_size - 1}: "
            f"python -m r3rag_jax.convert {path} OUT --add-tags, or resize_token_embeddings of transformers"
        )


def load_generation(path: str | Path) -> dict[str, Any]:
    """Read `generation_config.json` of a Hugging Face directory; returns {} if there is none.

    Raises:
        ValueError: the file is not a JSON object.
    """
    file = Path(path) / GENERATION_FILE
    if not file.is_file():
        return {}
    return read_json_object(file)


def save_decoder(
    decoder: Decoder,
    path: str | Path,
    *,
    dtype: str = "bfloat16",
    generation: Mapping[str, Any] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a decoder, whose parameters may be sharded over several processes, to a Hugging Face directory.

    One matrix of one layer is gathered at a time. All processes must call this. Process 0 writes, and the files are
    complete when it returns. See `write_model` for arguments and errors.
    """
    tensors = hf_tensors(decoder.config)
    numpy_dtype = write_dtype(dtype)[1]

    def gather(hf_name: str) -> np.ndarray:
        name, layer, _ = tensors[hf_name]
        value = decoder.param(name).get_value()
        matrix = _matrix(value, layer, transposed=name in _TRANSPOSED, dtype=numpy_dtype)
        if matrix.is_fully_addressable:
            return np.asarray(matrix)
        return multihost_utils.process_allgather(matrix, tiled=True)

    write_model(
        path, decoder.config, gather, dtype=dtype, generation=generation, max_file_bytes=max_file_bytes,
        is_writer=jax.process_index() == 0,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _matrix(value: jax.Array, layer: int | None, *, transposed: bool, dtype: Any) -> jax.Array:
    """Return a parameter, or one layer of a stacked one, in the layout and dtype of the files."""
    matrix = value if layer is None else jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
    return (matrix.T if transposed else matrix).astype(dtype)


def write_model(
    path: str | Path,
    config: DecoderConfig,
    tensor: Callable[[str], np.ndarray],
    *,
    dtype: str,
    generation: Mapping[str, Any] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    is_writer: bool = True,
) -> None:
    """Write weights, config.json and generation_config.json to directory `path`, as transformers reads them.

    Args:
        tensor: Hugging Face name -> array in the layout of the files; called for one tensor at a time.
        dtype: "bfloat16" or "float32".
        generation: contents of generation_config.json; None or empty: the file is not written.
        max_file_bytes: maximum bytes of weights per file.
        is_writer: see `write_tensors`.

    Raises:
        ValueError: `dtype` is neither of them.
    """
    hf, path, generation = config.to_hf(torch_dtype=dtype), Path(path), dict(generation or {})
    hf |= {key: generation[key] for key in TOKEN_IDS if key in generation}
    if is_writer:
        path.mkdir(parents=True, exist_ok=True)
        for file, value in ((CONFIG_FILE, hf), (GENERATION_FILE, generation)):
            if value:
                write_json(path / file, value)
    shapes = {hf_name: one.shape for hf_name, one in hf_tensors(config).items()}
    write_tensors(path, shapes, tensor, dtype=dtype, max_file_bytes=max_file_bytes, is_writer=is_writer)

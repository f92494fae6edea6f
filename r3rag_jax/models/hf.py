"""Decoders in Hugging Face directories: `config.json` with one or several safetensors files.

Hugging Face stores one [out, in] matrix per layer; the decoder keeps [Ly, in, out] stacks. Tensors
are read one at a time, so host memory holds one stack beside the files' page cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import Decoder, param_shapes

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"a model directory must hold {CONFIG_FILE}; {path} has none")
    try:
        return DecoderConfig.from_hf(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


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
            array = _read_param(files, name, shape, np.dtype(param.get_value().dtype))
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


class TensorFiles:
    """The tensors of a Hugging Face directory by name, in one safetensors file or in shards."""

    def __init__(self, path: str | Path):
        """Find which file holds which tensor.

        Raises:
            FileNotFoundError: neither weights nor index exist, or a shard named by the index is
                missing.
            ValueError: a file is not valid safetensors.
        """
        self._directory = Path(path)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        index = self._directory / INDEX_FILE
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.file_of: dict[str, str] = dict(weight_map)
        elif (self._directory / WEIGHTS_FILE).is_file():
            self.file_of = dict.fromkeys(self._file(WEIGHTS_FILE).keys(), WEIGHTS_FILE)
        else:
            raise FileNotFoundError(f"a model directory must hold {WEIGHTS_FILE} or {INDEX_FILE}; {path} has neither")

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def where(self, name: str) -> Path:
        """Return the path of the file that holds (or, by the layout, should hold) a tensor."""
        return self._directory / self.file_of.get(name, WEIGHTS_FILE)

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Read one tensor and check its shape.

        Raises:
            ValueError: the shape differs, or an index names a file that lacks the tensor.
        """
        try:
            array = self._file(self.file_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.where(name)}: cannot read tensor {name}: {error}") from error
        if array.shape != shape:
            raise ValueError(
                f"{self.where(name)}: tensor {name} must have shape {shape} by config.json; got {array.shape}"
            )
        return array

    def _file(self, file: str) -> Any:
        """Open a shard once."""
        if file not in self._open:
            path = self._directory / file
            if not path.is_file():
                raise FileNotFoundError(f"{INDEX_FILE} names {file}; {self._directory} lacks it")
            try:
                self._open[file] = self._stack.enter_context(safe_open(path, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
        return self._open[file]


def _check_names(config: DecoderConfig, files: TensorFiles) -> None:
    """Compare the tensors of the files with the ones the config asks for.

    Raises:
        ValueError: one is missing, or one is there that the decoder would not use.
    """
    expected = {
        HF_NAMES[name].format(i=i)
        for name in param_shapes(config)
        for i in range(config.num_layers if "{i}" in HF_NAMES[name] else 1)
    }
    found = {name for name in files.file_of if not name.endswith(_IGNORED_SUFFIXES)}
    if config.tie_embeddings:
        found.discard(HF_NAMES["lm_head"])  # some exports repeat the tied table
    for what, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            first = min(names)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{files.where(first)}: the tensors must be those of a {config.model_type} with "
                f"{config.num_layers} layers; {what}: {first}{more}"
            )


def _read_param(files: TensorFiles, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Read one parameter in our layout: transposed, cast, and stacked over layers."""
    is_stacked = "{i}" in HF_NAMES[name]
    out = np.empty(shape, dtype)
    for i, target in enumerate(out if is_stacked else out[None]):
        hf_shape = target.shape[::-1] if name in _TRANSPOSED else target.shape
        tensor = files.read(HF_NAMES[name].format(i=i), hf_shape)
        target[...] = tensor.T if name in _TRANSPOSED else tensor
    return out


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Put a host array on devices; with a sharding, each device receives its slice only."""
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

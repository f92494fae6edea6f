"""A Hugging Face model that runs on the own devices beside the policy: a local judge, or a local teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from r3rag_jax.config import LocalJudgeConfig
from r3rag_jax.errors import UserError
from r3rag_jax.models.hf.decoder_files import check_vocabulary, load_config, load_decoder
from r3rag_jax.models.params import param_shardings
from r3rag_jax.models.paths import model_path, reading
from r3rag_jax.sampler.cache.kv_cache import default_kv_dtype
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LocalModel:
    """A model that is ready to sample.

    Fields:
        identity: tells other weights at the same path apart, by the size and time of the files.
    """

    path: Path
    engine: Engine
    decoder: CachedDecoder
    tokenizer: Tokenizer
    identity: str


def open_local(config: LocalJudgeConfig, mesh: Mesh) -> LocalModel:
    """The model of a section such as `judge.local`, sharded over the mesh like a policy.

    Raises:
        UserError: the model cannot be read.
    """
    path, dtype = local_path(config), jnp.dtype(config.dtype)
    with reading(path):
        model_config, tokenizer = load_config(path), Tokenizer(path)
        check_vocabulary(model_config, tokenizer, path)
        decoder = load_decoder(path, dtype=dtype, shardings=param_shardings(mesh, model_config))
    graphdef, params = nnx.split(decoder)
    engine = Engine(graphdef, model_config, mesh, **engine_sizes(config, model_config, mesh))
    versions = [f"{f.stat().st_size} {f.stat().st_mtime_ns}" for f in sorted(path.glob("*.safetensors"))]
    identity = " ".join([config.path, config.dtype, *versions])
    return LocalModel(path, engine, engine.load(params), tokenizer, identity)


def engine_sizes(config: LocalJudgeConfig, model_config: Any, mesh: Mesh) -> dict[str, Any]:
    """Rows, their length and the cache's dtype of a local model, as arguments of `Engine` and `SamplerPrograms`."""
    dtype = default_kv_dtype(jnp.dtype(config.dtype), model_config, mesh)
    return {"slots": config.slots, "max_length": config.max_length, "dtype": dtype, "shard_weights": True}


def local_path(config: LocalJudgeConfig) -> Path:
    """The directory of a section such as `judge.local`.

    Raises:
        UserError: it holds no model.
    """
    path = model_path(config.path)
    if not (path / "config.json").is_file():
        raise UserError(f"{config.dotted}.path must be a Hugging Face directory with config.json; got {path}")
    return path

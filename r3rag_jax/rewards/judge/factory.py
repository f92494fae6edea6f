"""The judge of a configuration: a server's chat, or a Hugging Face model on the run's own devices."""

from __future__ import annotations

import math
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from r3rag_jax.clients.chat import ChatClient
from r3rag_jax.clients.endpoint import FIRST_WAIT_S, Endpoint
from r3rag_jax.config import JudgeConfig
from r3rag_jax.errors import UserError
from r3rag_jax.models.decoder import param_shapes, param_shardings
from r3rag_jax.models.hf.decoder_files import load_config, load_decoder, load_generation
from r3rag_jax.models.paths import model_path, reading
from r3rag_jax.rewards.judge.judge import CORRECTNESS_PROMPT, RELEVANCE_PROMPT, Judge, Kind, check_template
from r3rag_jax.sampler.cache.kv_cache import default_kv_dtype
from r3rag_jax.sampler.chat import EngineChat
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.sampler.memory import plan
from r3rag_jax.text.tokenizer import Tokenizer


def open_judge(config: JudgeConfig, mesh: Mesh, default_cache: Path, *, first_wait_s: float = FIRST_WAIT_S) -> Judge:
    """The judge, ready to be asked; a server is not asked anything yet.

    Raises:
        UserError: its model, key, prompts or file of judgements cannot be read.
    """
    chat = local_chat(config, mesh) if config.kind == "local" else served_chat(config, first_wait_s)
    return Judge(
        chat,
        Path(config.cache) if config.cache else default_cache,
        relevance_prompt=read_prompt(config.relevance_prompt, "relevance"),
        correctness_prompt=read_prompt(config.correctness_prompt, "correctness"),
        max_failure_share=config.max_failure_share,
    )


def read_prompt(path: str, kind: Kind) -> str:
    """The text of a template file; empty: ours.

    Raises:
        UserError: the file cannot be read, or does not show what is to be judged.
    """
    if not path:
        return RELEVANCE_PROMPT if kind == "relevance" else CORRECTNESS_PROMPT
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"judge.{kind}_prompt must be a text file; {path} cannot be read: {error}") from None
    return check_template(text, kind, path)


def served_chat(config: JudgeConfig, first_wait_s: float = FIRST_WAIT_S) -> ChatClient:
    """The chat model of a server."""
    endpoint = Endpoint(config.endpoint, name="judge.endpoint", first_wait_s=first_wait_s)
    return ChatClient(endpoint, max_tokens=config.max_tokens)


def local_chat(config: JudgeConfig, mesh: Mesh) -> EngineChat:
    """The chat of the model at `judge.local.path`, sharded over the mesh like a policy."""
    path, dtype = local_path(config), jnp.dtype(config.local.dtype)
    with reading(path):
        shape, tokenizer = load_config(path), Tokenizer(path)
        stops = load_generation(path).get("eos_token_id", [])
        stops = {tokenizer.eos_id, *(stops if isinstance(stops, list) else [stops])}
        decoder = load_decoder(path, dtype=dtype, shardings=param_shardings(mesh, shape))
    graphdef, params = nnx.split(decoder)
    engine = Engine(
        graphdef, shape, mesh, slots=config.local.slots, max_length=config.local.max_length,
        dtype=default_kv_dtype(dtype, shape, mesh), split_weights=True,
    )  # fmt: skip
    files = sorted(path.glob("*.safetensors"))
    marks = [f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]  # other weights may take their place
    with reading(path):  # its chat template
        return EngineChat(
            engine, engine.load(params), tokenizer, model=config.local.path,
            identity=" ".join([config.local.path, config.local.dtype, *marks]), stop_ids=sorted(stops),
            max_tokens=config.max_tokens,
        )  # fmt: skip


def local_path(config: JudgeConfig) -> Path:
    """The directory of `judge.local.path`."""
    path = model_path(config.local.path)
    if not (path / "config.json").is_file():
        raise UserError(f"judge.local.path must be a Hugging Face directory with config.json; got {path}")
    return path


def judge_memory(config: JudgeConfig, mesh: Mesh) -> dict[str, int]:
    """What a local judge keeps on each device, bytes; nothing for one on a server."""
    if config.kind == "server":
        return {}
    path, dtype = local_path(config), jnp.dtype(config.local.dtype)
    with reading(path):
        shape = load_config(path)
    places = param_shardings(mesh, shape)
    shares = [places[name].shard_shape(one) for name, one in param_shapes(shape).items()]
    local, dtype_of_cache = config.local, default_kv_dtype(dtype, shape, mesh)
    cache = plan(mesh, {}, shape, slots=local.slots, max_length=local.max_length, dtype=dtype_of_cache).cache
    return {"judge": sum(dtype.itemsize * math.prod(share) for share in shares), "judge's cache": cache}

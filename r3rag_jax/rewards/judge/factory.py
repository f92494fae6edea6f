"""Builds the judge of a configuration: a chat model on a server, or a Hugging Face model on the run's own devices."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from r3rag_jax.clients.chat import ChatClient
from r3rag_jax.clients.endpoint import FIRST_WAIT_S, Endpoint
from r3rag_jax.config import JudgeConfig
from r3rag_jax.errors import UserError
from r3rag_jax.models.hf.decoder_files import load_config
from r3rag_jax.models.paths import reading
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.rewards.judge.prompts import Prompts, check_template
from r3rag_jax.rewards.judge.verdicts import Kind
from r3rag_jax.sampler.chat import EngineChat
from r3rag_jax.sampler.local import engine_sizes, local_path, open_local
from r3rag_jax.sampler.memory import bytes_per_device
from r3rag_jax.sampler.programs import SamplerPrograms


def open_judge(config: JudgeConfig, mesh: Mesh, default_cache: Path, *, first_wait_s: float = FIRST_WAIT_S) -> Judge:
    """The judge of a configuration, ready to be asked; nothing is sent to a server yet.

    Args:
        config: the section `judge`.
        mesh: devices of a local judge.
        default_cache: the file of judgements where the configuration names none.
        first_wait_s: seconds before the first retry of a request.

    Raises:
        UserError: its model, key, prompts or file of judgements cannot be read.
    """
    chat = local_chat(config, mesh) if config.kind == "local" else served_chat(config, first_wait_s)
    return Judge(
        chat,
        Path(config.cache) if config.cache else default_cache,
        prompts=Prompts(
            relevance=read_prompt(config.relevance_prompt, "relevance"),
            correctness=read_prompt(config.correctness_prompt, "correctness"),
            candidates=read_prompt(config.candidates_prompt, "candidates"),
        ),
        max_failure_share=config.max_failure_share,
    )


def read_prompt(path: str, kind: Kind) -> str:
    """The template in a file; the built-in one where `path` is empty.

    Raises:
        UserError: the file cannot be read, or does not show what is to be judged.
    """
    if not path:
        return getattr(Prompts(), kind)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"judge.{kind}_prompt must be a text file; {path} cannot be read: {error}") from None
    return check_template(text, kind, path)


def served_chat(config: JudgeConfig, first_wait_s: float = FIRST_WAIT_S) -> ChatClient:
    """The chat model of a server.

    Raises:
        UserError: the URL is invalid, or the environment variable of the key is not set.
    """
    endpoint = Endpoint(config.endpoint, name="judge.endpoint", first_wait_s=first_wait_s)
    return ChatClient(endpoint, max_tokens=config.max_tokens)


def local_chat(config: JudgeConfig, mesh: Mesh) -> EngineChat:
    """The model at `judge.local.path`, sharded over the mesh like a policy.

    Raises:
        UserError: the model cannot be read.
    """
    local = open_local(config.local, mesh)
    with reading(local.path):  # its chat template
        return EngineChat(
            local.engine, local.decoder, local.tokenizer, model=config.local.path, identity=local.identity,
            max_tokens=config.max_tokens,
        )  # fmt: skip


def judge_memory(config: JudgeConfig, mesh: Mesh) -> dict[str, int]:
    """Bytes that the judge keeps on each device, by what they are; nothing for one on a server.

    Raises:
        UserError: the model's configuration cannot be read.
    """
    if config.kind == "server":
        return {}
    path, dtype = local_path(config.local), jnp.dtype(config.local.dtype)
    with reading(path):
        model_config = load_config(path)
    programs = SamplerPrograms(model_config, mesh, **engine_sizes(config.local, model_config, mesh))
    decoder = programs.abstract_decoder(dtype)
    return {
        "judge": bytes_per_device(decoder, programs.decoder_shardings(decoder)),
        "judge's cache": bytes_per_device(programs.cache, programs.cache.shardings(mesh)),
    }

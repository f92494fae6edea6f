"""The text encoders by name, and how one is made from the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from r3rag_jax.config.retrieval import EncoderConfig, RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.models.paths import model_path
from r3rag_jax.retrieval.base import Encoder
from r3rag_jax.retrieval.encoders.bert import BertEncoder
from r3rag_jax.retrieval.encoders.endpoint import EndpointEncoder
from r3rag_jax.retrieval.encoders.hashed import ENCODER_FILE, HashEncoder
from r3rag_jax.retrieval.store import PassageStore, open_store

MIN_ROWS = 64  # of a batch on an accelerator, where compiling a shape takes seconds, and a padded row next to nothing
# Tokens of a batch on a CPU: layers of larger ones leave its caches, and are slower by a fifth (MiniLM, 32 MB of L3).
CPU_TOKENS = 2048
# Triton matmuls are off on a GPU: choosing those of full float32 takes 18 of 20 s of compiling (H100), for no gain.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def new_hash(config: EncoderConfig, store: Callable[[], PassageStore]) -> HashEncoder:
    """A hash encoder, fitted on the passages."""
    return HashEncoder(config.dim).fit(passage.contents for passage in store().passages())


def new_bert(config: EncoderConfig, store: Callable[[], PassageStore]) -> BertEncoder:
    """An encoder of the BERT family, which does not depend on the passages."""
    backend = jax.default_backend()
    return BertEncoder(
        model_path(config.path),
        pooling=config.pooling,
        query_prefix=config.query_prefix,
        passage_prefix=config.passage_prefix,
        max_length=config.max_length,
        batch_tokens=min(config.batch_tokens, CPU_TOKENS) if backend == "cpu" else config.batch_tokens,
        dtype=config.dtype,
        min_rows=1 if backend == "cpu" else MIN_ROWS,
        fits_lengths=backend == "cpu",
        compiler_options=GPU_OPTIONS if backend == "gpu" else None,
    )


def new_endpoint(config: EncoderConfig, store: Callable[[], PassageStore]) -> EndpointEncoder:
    """An encoder on a server."""
    return EndpointEncoder(config)


# `retrieval.encoder.kind` -> what makes an encoder from its section and, if it asks for them, the passages.
ENCODERS: dict[str, Callable[[EncoderConfig, Callable[[], PassageStore]], Encoder]] = {
    "hash": new_hash,
    "bert": new_bert,
    "endpoint": new_endpoint,
}


def new_local_encoder(config: RetrievalConfig) -> Encoder:
    """The encoder of the configuration, which must be of a kind that does not depend on passages.

    Raises:
        UserError: the encoder's directory cannot be read.
    """

    def no_store() -> PassageStore:
        raise ValueError(f"an encoder without passages must not depend on them; got {config.encoder.kind}")

    return ENCODERS[config.encoder.kind](config.encoder, no_store)


def new_encoder(config: RetrievalConfig, store: PassageStore) -> Encoder:
    """The encoder of the configuration, for passages that are to be indexed.

    Raises:
        UserError: the encoder's directory cannot be read.
    """
    return ENCODERS[config.encoder.kind](config.encoder, lambda: store)


def open_encoder(config: RetrievalConfig, index_dir: str | Path) -> Encoder:
    """The encoder of the configuration, for an index.

    A hash encoder is read from the index, or, where the index has none because its retriever needs none, fitted on the
    index's passages.

    Raises:
        UserError: the encoder's directory cannot be read, its server does not answer or is of another model than the
            index, or the index's hash encoder has another size.
    """
    file = Path(index_dir) / ENCODER_FILE
    if config.encoder.kind != "hash" or not file.is_file():
        opened = ENCODERS[config.encoder.kind](config.encoder, lambda: open_store(index_dir))
        if isinstance(opened, EndpointEncoder):
            opened.check_index(Path(index_dir))
        return opened
    encoder = HashEncoder.load(file)
    if encoder.dim != config.encoder.dim:
        raise UserError(
            f"retrieval.encoder.dim must be {encoder.dim}, the size of the vectors in {index_dir}; "
            f"got {config.encoder.dim}"
        )
    return encoder

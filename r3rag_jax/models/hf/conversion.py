"""Conversion of a model to a Hugging Face directory, one tensor at a time; optionally adds the protocol's tags."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.errors import UserError
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.hf.decoder_files import (
    HF_NAMES,
    check_decoder,
    hf_tensors,
    load_config,
    load_generation,
    write_model,
)
from r3rag_jax.models.hf.tensor_files import CONFIG_FILE, TensorFiles
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.files import new_directory
from r3rag_jax.text.protocols import TAGS
from r3rag_jax.text.tokenizer import Tokenizer

POLICY_PHASES = ("rl", "sft")  # phases of a run that save a policy, in the order of preference


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to convert: configuration, tokenizer, and a function that reads one tensor."""

    config: DecoderConfig
    tokenizer: Tokenizer
    generation: dict[str, Any]  # contents of generation_config.json
    dtype: str  # default dtype of the output: "bfloat16" if every tensor has it, else "float32"
    tensor: Callable[[str], np.ndarray]  # Hugging Face name -> array, in the layout of the files


def find_model(source: Path) -> Path:
    """Resolve SOURCE to a Hugging Face directory or a file; a run directory gives its best policy.

    Raises:
        UserError: SOURCE is neither a Hugging Face directory, nor a file, nor a run directory with a policy.
    """
    candidates = [source, *(RunDirectory(source).policy(phase) for phase in POLICY_PHASES)]
    for path in candidates:
        if (path / CONFIG_FILE).is_file():
            return path
    if source.is_file():
        return source
    raise UserError(
        f"SOURCE must be a Hugging Face directory with {CONFIG_FILE}, a run directory with a trained policy or a "
        f".gguf file; got {source}"
    )


def export(source: Source, out: Path, dtype: str) -> None:
    """Write weights, configurations and tokenizer to a temporary directory, which is then renamed to `out`."""
    with new_directory(out) as partial:
        write_model(partial, source.config, source.tensor, dtype=dtype, generation=source.generation)
        source.tokenizer.save(partial)


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[Source]:
    """Open a Hugging Face directory. Names and shapes of the tensors are checked at once, data is read on demand.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is invalid, or a tensor is invalid or missing (the message names it).
    """
    config, tokenizer = load_config(path), Tokenizer(path)
    tensors = hf_tensors(config)
    with TensorFiles(path) as files:
        check_decoder(config, files)
        is_half = all(files.dtype(name) == "BF16" for name in tensors)
        yield Source(
            config, tokenizer, tokenizer.complete_generation(load_generation(path)),
            "bfloat16" if is_half else "float32",
            lambda name: files.read(name, tuple(slice(0, size) for size in tensors[name].shape)),
        )  # fmt: skip


def add_tags(source: Source) -> Source:
    """Return the same model with TAGS as special tokens.

    The embedding of a new tag is the mean of the embeddings of its text: `<query>` of the tokens of "query", `</query>`
    of those of "/query", so that the two differ. An untied output layer gets rows in the same way. New tokens use the
    unused rows of the embedding table first, then appended rows. Tags that are in the vocabulary keep their rows.

    Other tokens for which the table has no row get one too: the mean of the embeddings of their text, or of all tokens
    where that is not spelled with others.
    """
    tokenizer = source.tokenizer
    words = tokenizer.tokens_from(source.config.vocab_size)
    words |= {tag: tag[1:-1] for tag in TAGS if tag in words or tag not in tokenizer}
    spelled = {token: tokenizer.encode(word, allow_special=False) for token, word in words.items()}
    tokenizer.add_special_tokens(TAGS)
    vocab_size = max(source.config.vocab_size, tokenizer.vocab_size)

    def tensor(name: str) -> np.ndarray:
        array = source.tensor(name)
        if name not in (HF_NAMES["embed"], HF_NAMES["lm_head"]):
            return array
        table = np.zeros((vocab_size, array.shape[1]), array.dtype)
        table[: len(array)] = array
        for token, ids in spelled.items():
            rows = [i for i in ids if i < len(array)] or slice(None)
            table[tokenizer.token_id(token)] = array[rows].mean(axis=0, dtype=np.float32)
        return table

    return dataclasses.replace(source, config=dataclasses.replace(source.config, vocab_size=vocab_size), tensor=tensor)

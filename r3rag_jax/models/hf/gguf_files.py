"""Reads GGUF files with transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.errors import UserError
from r3rag_jax.models.config import DecoderConfig, RopeScaling
from r3rag_jax.models.decoder import rope_frequencies
from r3rag_jax.models.hf.conversion import Source
from r3rag_jax.text.tokenizer import Tokenizer

GGUF_MAGIC = b"GGUF"
GGUF_NEEDS = ("torch", "transformers", "gguf", "accelerate")


@contextlib.contextmanager
def open_gguf(path: Path, dtype: str | None) -> Iterator[Source]:
    """Open a GGUF file; transformers dequantizes the whole model to `dtype` (None: float32).

    Tensors are read from the model's state dict, because transformers does not save models that were quantized.

    Raises:
        UserError: the file is not a GGUF file, or a library is not installed.
        ValueError: the model is not supported, or the file lacks a tensor.
    """
    with path.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise UserError(f"a model in one file must be GGUF, which begins with {GGUF_MAGIC!r}; got {path}")
    try:
        torch, transformers, gguf, _ = map(importlib.import_module, GGUF_NEEDS)
    except ImportError as error:
        raise UserError(
            f"{path} is read with {', '.join(GGUF_NEEDS)}; {error}: pip install 'r3rag_jax[gguf]'"
        ) from error
    dtype = dtype or "float32"
    # transformers would also read other files next to the GGUF file, so give it a directory of its own.
    with tempfile.TemporaryDirectory() as directory, _quiet(transformers):
        (Path(directory) / "model.gguf").symlink_to(path.resolve())
        location: dict[str, Any] = {"pretrained_model_name_or_path": directory, "gguf_file": "model.gguf"}
        config = DecoderConfig.from_hf(transformers.AutoConfig.from_pretrained(**location).to_dict())
        config = _with_rope_factors(config, gguf.GGUFReader(path))
        model, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
            **location, dtype=getattr(torch, dtype), output_loading_info=True
        )
        transformers.AutoTokenizer.from_pretrained(**location).save_pretrained(directory)
        tokenizer = Tokenizer(directory)
    for kind in ("missing", "mismatched", "unexpected"):
        if names := sorted(map(str, loading_info[f"{kind}_keys"])):  # transformers initialises missing ones randomly
            raise ValueError(f"the tensors must be those of a {config.model_type}; {kind}: {names[0]}")
    state = model.state_dict()
    yield Source(config, tokenizer, tokenizer.complete_generation({}), dtype, lambda name: state[name].float().numpy())


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence progress bars and warnings of transformers; convert all of its exceptions to ValueErrors."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # one progress bar ignores both settings
            yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _with_rope_factors(config: DecoderConfig, reader: Any) -> DecoderConfig:
    """Add the RoPE scaling of Llama 3.1, which GGUF stores as a tensor that transformers ignores.

    Raises:
        ValueError: the tensor is not the scaling of Llama 3.1.
    """
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is None:
        return config
    # Llama 3.1, 3.2 and 3.3 share the three constants; `factor` is 8 or 32.
    scaling = RopeScaling(float(factors.max()), 1.0, 4.0, original_max_position_embeddings=8192)
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    want = rope_frequencies(config) / factors
    if want.shape != factors.shape or not np.allclose(rope_frequencies(scaled), want, rtol=1e-4, atol=0.0):
        raise ValueError("rope_freqs.weight must be the rotary scaling of Llama 3.1; got another")
    return scaled

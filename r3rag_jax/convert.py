"""Write a model as a Hugging Face directory, which training, `transformers` and most servers load.

    python -m r3rag_jax.convert SOURCE OUT [--dtype float32|bfloat16] [--add-tags]

SOURCE is a Hugging Face directory, a run directory (its last trained policy), a .gguf file or package:NAME, for
the one of these in an installed package. Tensors pass one at a time, so that host memory holds no copy of the model;
only GGUF, which transformers reads, is read whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.config.loader import FlagParser
from r3rag_jax.errors import UserError, main_guard
from r3rag_jax.evaluate import PHASES
from r3rag_jax.models.config import DecoderConfig, RopeScaling
from r3rag_jax.models.decoder import param_shapes, rope_frequencies
from r3rag_jax.models.hf.decoder_files import (
    HF_NAMES,
    check_decoder,
    hf_tensors,
    load_config,
    load_generation,
    write_model,
)
from r3rag_jax.models.hf.tensor_files import CONFIG_FILE, WRITE_DTYPES, TensorFiles
from r3rag_jax.models.paths import model_path, reading
from r3rag_jax.text.protocols import TAGS
from r3rag_jax.text.tokenizer import Tokenizer

GGUF_MAGIC = b"GGUF"
GGUF_NEEDS = ("torch", "transformers", "gguf", "accelerate")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model as it is read."""

    config: DecoderConfig
    tokenizer: Tokenizer
    generation: dict[str, Any]  # of generation_config.json
    dtype: str  # what is written unless asked otherwise: "bfloat16" if every tensor is, else "float32"
    tensor: Callable[[str], np.ndarray]  # by Hugging Face name, in the layout of the files


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "source", metavar="SOURCE", help="Hugging Face directory, run directory, .gguf file or package:NAME"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new or empty directory")
    parser.add_argument(
        "--dtype",
        choices=sorted(WRITE_DTYPES),
        help="of the weights; default: bfloat16 where all of SOURCE is, otherwise float32",
    )
    parser.add_argument(
        "--add-tags", action="store_true", help="add the special tokens of rollout.protocol=tags: " + " ".join(TAGS)
    )
    args = parser.parse_args(argv)
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UserError(f"OUT must be a new or empty directory; got {args.out}")
    path = find_model(model_path(args.source))
    with reading(path), open_gguf(path, args.dtype) if path.is_file() else open_directory(path) as source:
        if args.add_tags:
            source = add_tags(source)
        dtype = args.dtype or source.dtype
        try:
            export(source, args.out, dtype)
        except OSError as error:
            raise UserError(f"{args.out} cannot be written: {error}") from error
    size = sum(math.prod(shape) for shape in param_shapes(source.config).values())
    model = f"{source.config.model_type}, {size:,} parameters in {dtype}"
    print(f"{args.out}: {model}, {source.tokenizer.vocab_size:,} tokens")
    return 0


def find_model(source: Path) -> Path:
    """The Hugging Face directory or the file that SOURCE means.

    Raises:
        UserError: it is neither of them, nor a run with a policy.
    """
    candidates = [source, *(source / "policy" / phase for phase in PHASES)]
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
    """Write weights, configurations and tokenizer; the directory appears only when it is complete."""
    out = out.absolute()  # "." has no name
    partial = out.with_name(f".{out.name}.partial")
    write_model(partial, source.config, source.tensor, dtype=dtype, generation=source.generation)
    source.tokenizer.save(partial)
    partial.rename(out)


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[Source]:
    """A Hugging Face directory; its tensors are checked now and read when asked for.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file or a tensor is wrong or missing, by name.
    """
    config, tokenizer = load_config(path), Tokenizer(path)
    tensors = hf_tensors(config)
    with TensorFiles(path) as files:
        check_decoder(config, files)
        is_half = all(files.dtype(name) == "BF16" for name in tensors)
        yield Source(
            config, tokenizer, tokenizer.generation_ids() | load_generation(path), "bfloat16" if is_half else "float32",
            lambda name: files.read(name, tuple(slice(0, size) for size in tensors[name].shape)),
        )  # fmt: skip


# ---------------------------------------------------------------------------------------- tags


def add_tags(source: Source) -> Source:
    """The same model with TAGS as special tokens, which start as the mean of their words' embeddings.

    `<query>` starts as the tokens of "query", `</query>` as those of "/query", lest a tag and its end are
    one. Rows of the table that no token uses yet are used first, and others appended; so with the output layer's
    rows where it is not the same table. Tokens that are in the vocabulary already keep their rows.
    """
    tokenizer = source.tokenizer
    words = {tag: tokenizer.encode(tag[1:-1], allow_special=False) for tag in TAGS if tag not in tokenizer}
    tokenizer.add_special_tokens(TAGS)
    vocab_size = max(source.config.vocab_size, tokenizer.vocab_size)

    def tensor(name: str) -> np.ndarray:
        array = source.tensor(name)
        if name not in (HF_NAMES["embed"], HF_NAMES["lm_head"]):
            return array
        table = np.zeros((vocab_size, array.shape[1]), array.dtype)
        table[: len(array)] = array
        for tag, ids in words.items():
            table[tokenizer.token_id(tag)] = array[ids].astype(np.float32).mean(axis=0)
        return table

    return dataclasses.replace(source, config=dataclasses.replace(source.config, vocab_size=vocab_size), tensor=tensor)


# ---------------------------------------------------------------------------------------- GGUF


@contextlib.contextmanager
def open_gguf(path: Path, dtype: str | None) -> Iterator[Source]:
    """A GGUF file, dequantized whole into `dtype` (float32 when None) by transformers.

    The tensors are taken from the model's state, as transformers refuses to save a model that was quantized.

    Raises:
        UserError: the file is no GGUF, or a library is not installed.
        ValueError: the model is not one this package computes, or the file lacks a tensor.
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
    # By itself in a directory: transformers would also read another model's files that lie beside it.
    with tempfile.TemporaryDirectory() as directory, _quiet(transformers):
        (Path(directory) / "model.gguf").symlink_to(path.resolve())
        place: dict[str, Any] = {"pretrained_model_name_or_path": directory, "gguf_file": "model.gguf"}
        config = DecoderConfig.from_hf(transformers.AutoConfig.from_pretrained(**place).to_dict())
        config = _with_rope_factors(config, gguf.GGUFReader(path))
        model, said = transformers.AutoModelForCausalLM.from_pretrained(
            **place, dtype=getattr(torch, dtype), output_loading_info=True
        )
        transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(directory)
        tokenizer = Tokenizer(directory)
    for what in ("missing", "mismatched", "unexpected"):
        if names := sorted(map(str, said[f"{what}_keys"])):  # transformers draws what is missing at random
            raise ValueError(f"the tensors must be those of a {config.model_type}; {what}: {names[0]}")
    state = model.state_dict()
    yield Source(config, tokenizer, tokenizer.generation_ids(), dtype, lambda name: state[name].float().numpy())


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and warnings; whatever transformers raises over a file, of any type, becomes a ValueError."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # for the bar that minds neither
            yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _with_rope_factors(config: DecoderConfig, reader: Any) -> DecoderConfig:
    """The configuration with the rotary scaling of Llama 3.1, which GGUF keeps as a tensor and transformers drops.

    Raises:
        ValueError: the tensor holds another scaling.
    """
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is None:
        return config
    # All Llama 3.1, 3.2 and 3.3 have these three numbers; `factor` is 8 or 32.
    scaling = RopeScaling(float(factors.max()), 1.0, 4.0, original_max_position_embeddings=8192)
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    want = rope_frequencies(config) / factors
    if want.shape != factors.shape or not np.allclose(rope_frequencies(scaled), want, rtol=1e-4, atol=0.0):
        raise ValueError("rope_freqs.weight must be the rotary scaling of Llama 3.1; got another")
    return scaled


if __name__ == "__main__":
    sys.exit(main())

"""A dense text encoder of the BERT family (MiniLM, E5, BGE), read from a Hugging Face directory.

Where the directory is one of sentence-transformers, its own files say how hidden states are pooled, how long a
text may be and, where they hold prompts, what is put before queries and passages. Vectors always get norm 1, and
texts are read as sentence-transformers reads them: one that spells a special token becomes that token.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tokenizers import Tokenizer

from r3rag_jax.errors import UserError
from r3rag_jax.models.encoder import POOLINGS, load_encoder, pool, unit
from r3rag_jax.models.hf.tensor_files import CONFIG_FILE, TensorFiles, read_json
from r3rag_jax.retrieval.base import TextKind

TOKENIZER_FILE = "tokenizer.json"
MODULES_FILE = "modules.json"  # sentence-transformers: the steps from a text to its vector
PROMPTS_FILE = "config_sentence_transformers.json"
# What it calls the prompts, in the order that sentence-transformers looks.
PROMPTS = {"query": ("query",), "passage": ("document", "passage", "corpus")}
# Where the longest text stands, in the order that sentence-transformers looks.
LENGTHS = {"sentence_bert_config.json": "max_seq_length", "tokenizer_config.json": "model_max_length"}
_CHUNK = 4096  # texts that are tokenized and sorted by length at once
_MIN_LENGTH = 16  # tokens of the shortest bucket


class BertEncoder:
    """Texts -> float32 [n, D] of norm 1, in the order they came.

    Texts of similar length share a batch, whose shape is one of a few (see `_lengths` and `_row_counts`). A
    text's vector depends on its batch by rounding only. A batch is split over the devices of this process where
    its rows divide; every device holds the model.

    Args:
        path: a Hugging Face directory: config.json, safetensors, tokenizer.json.
        pooling: "mean" or "cls"; "auto" is what sentence-transformers' modules.json says.
        query_prefix: put before every query, e.g. "query: " for E5. passage_prefix: before every passage. "auto" is
            the directory's prompt, or nothing where it has none.
        max_length: longest text in tokens, special ones included; what is longer is cut. 0 takes the limit of
            sentence_bert_config.json or tokenizer_config.json, or else of the model.
        batch_tokens: tokens of a batch, padding included; a bound on memory.
        dtype: compute type, "float32" or "bfloat16".

    Raises:
        UserError: a file is missing, or asks for something that is not computed; the message names it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        pooling: str = "auto",
        query_prefix: str = "auto",
        passage_prefix: str = "auto",
        max_length: int = 0,
        batch_tokens: int = 16_384,
        dtype: str = "float32",
    ) -> None:
        self._path = Path(path).absolute()
        self._batch_tokens = batch_tokens
        try:
            model = load_encoder(self._path, dtype=jnp.dtype(dtype))
            self._tokenizer = _read_tokenizer(self._path, model.config.vocab_size)
            self._max_length = _max_length(self._path, max_length, model.config.max_positions)
            pooling = _pooling(self._path, pooling)
            query_prefix = _prefix(self._path, query_prefix, "query")
            passage_prefix = _prefix(self._path, passage_prefix, "passage")
        except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"the encoder at {path} cannot be read: {error}") from error
        self._tokenizer.enable_truncation(self._max_length)
        self._prefixes: dict[str, str] = {"query": query_prefix, "passage": passage_prefix}
        self._settings = {
            "pooling": pooling,
            "query_prefix": query_prefix,
            "passage_prefix": passage_prefix,
            "max_length": self._max_length,
            "dtype": dtype,
        }
        self._dim = model.config.hidden_size
        graphdef, params = nnx.split(model)
        mesh = Mesh(np.array(jax.local_devices()), ("rows",), axis_types=(AxisType.Auto,))
        self._by_rows = NamedSharding(mesh, PartitionSpec("rows"))
        self._everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._here = jax.tree.map(lambda x: x.addressable_data(0), self._everywhere)

        def embed(params: Any, tokens_BL: jax.Array, lengths_B: jax.Array) -> jax.Array:
            mask_BL = jnp.arange(tokens_BL.shape[1]) < lengths_B[:, None]
            hidden_BLD = nnx.merge(graphdef, params)(tokens_BL, mask_BL)
            return unit(pool(hidden_BLD, mask_BL, pooling))

        self._embed = jax.jit(embed, compiler_options=_compiler_options())

    @property
    def dim(self) -> int:
        """Size D of the vectors, floats."""
        return self._dim

    @property
    def cosine_kind(self) -> TextKind:
        """Passages are read as passages, whatever their vectors are for."""
        return "passage"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of model, tokenizer and settings; neither of their place nor of the batch size."""
        with TensorFiles(self._path) as files:
            weights = sorted(set(files.file_of.values()))
        sha = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode())
        for name in (CONFIG_FILE, TOKENIZER_FILE, *weights):
            with open(self._path / name, "rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
        return sha.hexdigest()

    def encode(self, texts: Sequence[str], *, kind: TextKind = "query") -> np.ndarray:
        """float32 [len(texts), D], each row of L2 norm 1.

        Raises:
            TypeError: a single text instead of a list. ValueError: `kind` is unknown.
        """
        if isinstance(texts, str):
            raise TypeError(f"encode takes a list of texts; got the single text {texts!r}")
        if kind not in self._prefixes:
            raise ValueError(f"kind must be 'query' or 'passage'; got {kind!r}")
        out_ND = np.empty((len(texts), self._dim), np.float32)
        for start in range(0, len(texts), _CHUNK):
            chunk = [self._prefixes[kind] + text for text in texts[start : start + _CHUNK]]
            ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(chunk)]
            running = [(rows, self._start(*batch)) for rows, batch in self._batches(ids)]
            for rows, vectors in running:
                out_ND[start + rows] = np.asarray(vectors)[: len(rows)]
        return out_ND

    def _batches(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
        """Yield (positions [b] in `ids`, (tokens int32 [B, L], lengths int32 [B])); every text once, b <= B."""
        sizes = np.array([len(row) for row in ids])
        lengths = _lengths(self._max_length)
        buckets = np.searchsorted(lengths, sizes)
        for bucket in np.unique(buckets):
            length = lengths[bucket]
            waiting = np.flatnonzero(buckets == bucket)
            for num_rows in _row_counts(len(waiting), self._batch_tokens // length, _least_rows()):
                rows, waiting = waiting[:num_rows], waiting[num_rows:]
                tokens_BL = np.zeros((num_rows, length), np.int32)
                for i, row in enumerate(rows):
                    tokens_BL[i, : sizes[row]] = ids[row]
                lengths_B = np.zeros(num_rows, np.int32)
                lengths_B[: len(rows)] = sizes[rows]
                yield rows, (tokens_BL, lengths_B)

    def _start(self, tokens_BL: np.ndarray, lengths_B: np.ndarray) -> jax.Array:
        """The vectors of a batch, float32 [B, D], not waited for: on all devices of this process or on the first."""
        if len(tokens_BL) % self._by_rows.num_devices:
            return self._embed(self._here, tokens_BL, lengths_B)
        return self._embed(self._everywhere, *jax.device_put((tokens_BL, lengths_B), self._by_rows))

    # ---- files ----

    def save(self, path: str | Path) -> None:
        """Write where the model is and how it is used to `path`, a JSON file; the model stays where it is."""
        settings = {"encoder": "bert", "path": str(self._path), **self._settings, "batch_tokens": self._batch_tokens}
        Path(path).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> BertEncoder:
        """Read what `save` wrote, and the model from where it was then.

        Raises:
            UserError: the file, or the model, is missing or is not what was saved.
        """
        try:
            settings = read_json(Path(path))
            if settings.pop("encoder") != "bert":
                raise ValueError("not a bert")
            return cls(settings.pop("path"), **settings)
        except FileNotFoundError as error:
            raise UserError(f"an encoder is read from an existing file; {path} is missing") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"an encoder file is a JSON object written by BertEncoder.save; {path}: {error}") from error


def _lengths(max_length: int) -> list[int]:
    """Tokens of a batch's rows, ascending: powers of two, from 64 on with one between, and the maximum."""
    lengths = [_MIN_LENGTH]
    while lengths[-1] < max_length:
        power = 1 << (lengths[-1].bit_length() - 1)
        lengths.append(3 * power // 2 if lengths[-1] == power >= 64 else 2 * power)
    return [length for length in lengths if length < max_length] + [max_length]


def _compiler_options() -> dict[str, Any] | None:
    """No Triton matmuls on a GPU: choosing those of full float32 takes 18 of 20 s of compiling (H100), to no gain."""
    return {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else None


def _least_rows() -> int:
    """Rows of the smallest batch. Compiling a shape takes an accelerator seconds, and a padded row next to nothing."""
    return 1 if jax.default_backend() == "cpu" else 64


def _row_counts(num_texts: int, max_rows: int, least: int) -> Iterator[int]:
    """Rows of the batches that hold `num_texts` texts: `least` times 1, 4, 16, …, with at most a quarter of padding.

    At most 64 rows, from 1: 17 -> 16, 1 and 31 -> 16, 16 and 50 -> 64. Fewer than `least` texts are padded to it.
    """
    while num_texts > 0:
        rows = max(1, min(least, max_rows))
        while 4 * rows <= max_rows and 3 * rows <= num_texts:
            rows *= 4
        yield rows
        num_texts -= rows


def _read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a directory, without padding.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it cannot be read, sets no special tokens around a text, or has ids that the model lacks.
    """
    file = path / TOKENIZER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"its directory must hold {TOKENIZER_FILE}; {path} has none")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no narrower one
        raise ValueError(f"{file} must be a tokenizer: {error}") from error
    tokenizer.no_padding()
    empty = tokenizer.encode("").tokens
    if len(empty) != 2:
        raise ValueError(f"{file} must set one special token before a text and one behind it; '' became {empty}")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:  # jax would read the last row instead
        raise ValueError(f"{file} must hold ids below the model's vocab_size {vocab_size}; got {largest}")
    return tokenizer


def _max_length(path: Path, asked: int, max_positions: int) -> int:
    """The longest text in tokens: as asked, or where that is 0 as the directory says."""
    if asked:
        if not 3 <= asked <= max_positions:
            raise ValueError(f"max_length must be in [3, {max_positions}], or 0 for the encoder's own; got {asked}")
        return asked
    for name, key in LENGTHS.items():
        file = path / name
        limit = read_json(file).get(key) if file.is_file() else None
        if limit is not None:
            return int(min(limit, max_positions))  # tokenizers without a limit state 1e30
    return max_positions


def _prefix(path: Path, asked: str, kind: TextKind) -> str:
    """The prefix as asked, or where that is "auto" the prompt of sentence-transformers' file, or ""."""
    file = path / PROMPTS_FILE
    if asked != "auto" or not file.is_file():
        return "" if asked == "auto" else asked
    settings = read_json(file)
    prompts = settings.get("prompts") or {}
    name = next((name for name in (*PROMPTS[kind], settings.get("default_prompt_name")) if name in prompts), None)
    prompt = "" if name is None else prompts[name]
    if not isinstance(prompt, str):
        raise ValueError(f"{file} must hold prompts as texts; {name!r} is {prompt!r}")
    return prompt


def _pooling(path: Path, asked: str) -> str:
    """The pooling as asked, or where that is "auto" as sentence-transformers' files say."""
    if asked in POOLINGS:
        return asked
    file = path / MODULES_FILE
    if asked != "auto" or not file.is_file():
        raise ValueError(f"pooling must be one of {POOLINGS}, or auto where {MODULES_FILE} names it; got {asked!r}")
    modules = {module["type"].rpartition(".")[2]: module["path"] for module in read_json(file)}
    if not {"Pooling"} <= modules.keys() <= {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(f"{file} must name Transformer, Pooling and perhaps Normalize; got {', '.join(modules)}")
    file = path / modules["Pooling"] / CONFIG_FILE
    settings = read_json(file)
    mode = settings.get("pooling_mode")  # one word since version 6, switches before
    switches = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    on = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
    if mode is None and len(on) == 1:
        mode = switches.get(on[0], on[0])
    if mode not in POOLINGS:
        raise ValueError(f"{file} must choose one pooling of {POOLINGS}; got {mode or on}")
    if not settings.get("include_prompt", True):
        raise ValueError(f"{file}: pooling without the prefix is not computed; include_prompt is false")
    return mode

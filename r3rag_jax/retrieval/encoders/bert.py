"""A dense text encoder of the BERT family (MiniLM, E5, BGE), read from a Hugging Face directory.

Where the directory is one of sentence-transformers, its own files define the pooling, the longest text and the
prefixes of queries and passages. Vectors always have norm 1. As in sentence-transformers, a text that spells a special
token is tokenized to it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from r3rag_jax.errors import UserError
from r3rag_jax.models.encoder import load_encoder, pool, unit
from r3rag_jax.models.hf.tensor_files import CONFIG_FILE, TensorFiles
from r3rag_jax.retrieval.base import TextKind
from r3rag_jax.retrieval.encoders.sentence_transformers import (
    TOKENIZER_FILE,
    read_max_length,
    read_pooling,
    read_prefix,
    read_tokenizer,
)
from r3rag_jax.retrieval.encoders.traced import Inputs
from r3rag_jax.run.files import write_text

ENCODER_FILE = "encoder.json"  # in an index directory
_CHUNK = 4096  # texts that are tokenized and sorted by length at once
_MIN_LENGTH = 16  # tokens of the shortest bucket
_MANY = 1024  # texts for which batches of close-fitting lengths are worth compiling


class BertEncoder:
    """Texts -> float32 [n, D] of norm 1, in the order of the texts.

    Texts of similar length share a batch, whose shape is one of a few (see `_lengths` and `_row_counts`) or, for many
    texts on a CPU, of some dozens (`_fitting_batches`). A text's vector depends on the other texts of its batch by
    rounding only. A batch whose number of rows is divisible by the number of this process's devices is split over them;
    every device holds the model.
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
        min_rows: int = 1,
        fits_lengths: bool = False,
        compiler_options: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            path: a Hugging Face directory: config.json, safetensors, tokenizer.json.
            pooling: "mean" or "cls"; "auto" is what sentence-transformers' modules.json says.
            query_prefix: text before every query, e.g. "query: " for E5; "auto" is the directory's prompt, if any.
            passage_prefix: text before every passage, likewise.
            max_length: longest text in tokens, special ones included; longer texts are truncated. 0 is the limit in
                sentence_bert_config.json or tokenizer_config.json, or else the model's.
            batch_tokens: tokens of a batch, padding included; bounds the memory.
            dtype: compute dtype, "float32" or "bfloat16".
            min_rows: rows of the smallest batch.
            fits_lengths: whether many texts are encoded in batches of two or three dozen lengths instead of a few: less
                padding, but more shapes to compile.
            compiler_options: of XLA, for this model.

        Raises:
            UserError: a file is missing, or asks for something that is not implemented; the message names it.
        """
        self._path = Path(path).absolute()
        self._batch_tokens, self._min_rows, self._fits_lengths = batch_tokens, min_rows, fits_lengths
        try:
            model = load_encoder(self._path, dtype=jnp.dtype(dtype))
            self._tokenizer = read_tokenizer(self._path, model.config.vocab_size)
            self._max_length = read_max_length(self._path, max_length, model.config.max_positions)
            pooling = read_pooling(self._path, pooling)
            query_prefix = read_prefix(self._path, query_prefix, "query")
            passage_prefix = read_prefix(self._path, passage_prefix, "passage")
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
        self._graphdef, self._pooling = graphdef, pooling
        self._run = jax.jit(self.embed, compiler_options=dict(compiler_options) if compiler_options else None)

    @property
    def dim(self) -> int:
        """Size D of the vectors, floats."""
        return self._dim

    @property
    def cosine_kind(self) -> TextKind:
        """Passages are always encoded as passages."""
        return "passage"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of model, tokenizer and settings, but not of their path or of the batch size."""
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
            TypeError: `texts` is a single text instead of a list.
            ValueError: `kind` is unknown.
        """
        if isinstance(texts, str):
            raise TypeError(f"encode takes a list of texts; got the single text {texts!r}")
        if kind not in self._prefixes:
            raise ValueError(f"kind must be 'query' or 'passage'; got {kind!r}")
        out_ND = np.empty((len(texts), self._dim), np.float32)
        for start in range(0, len(texts), _CHUNK):
            ids = self._tokenized(texts[start : start + _CHUNK], kind)
            dispatched = [(rows, self._dispatch(*batch)) for rows, batch in self._batches(ids)]
            for rows, vectors in dispatched:
                out_ND[start + rows] = np.asarray(vectors)[: len(rows)]
        return out_ND

    def _tokenized(self, texts: Sequence[str], kind: str) -> list[list[int]]:
        """The ids of each text, with its prefix and the special tokens, truncated."""
        prefixed = [self._prefixes[kind] + text for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(prefixed)]

    def _batches(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
        """Yield (positions [b] in `ids`, (tokens int32 [B, L], lengths int32 [B])), b <= B; every text once."""
        sizes = np.array([len(row) for row in ids])
        waiting = np.arange(len(ids))
        if self._fits_lengths and len(ids) >= _MANY:
            full, waiting = _fitting_batches(sizes, self._max_length, self._batch_tokens, self._by_rows.num_devices)
            for rows, length in full:
                yield rows, _padded([ids[row] for row in rows], len(rows), length)
        lengths = _lengths(self._max_length)
        buckets = np.searchsorted(lengths, sizes[waiting])
        for bucket in np.unique(buckets):
            length = lengths[bucket]
            texts = waiting[buckets == bucket]
            for num_rows in _row_counts(len(texts), self._batch_tokens // length, self._min_rows):
                rows, texts = texts[:num_rows], texts[num_rows:]
                yield rows, _padded([ids[row] for row in rows], num_rows, length)

    def _dispatch(self, tokens_BL: np.ndarray, lengths_B: np.ndarray) -> jax.Array:
        """The vectors of a batch, float32 [B, D], computed asynchronously on all devices of this process or one."""
        if len(tokens_BL) % self._by_rows.num_devices:
            return self._run(self._here, tokens_BL, lengths_B)
        return self._run(self._everywhere, *jax.device_put((tokens_BL, lengths_B), self._by_rows))

    def embed(self, params: Any, tokens_BL: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """See `TracedEncoder.embed`: vectors of norm 1 of int32 tokens [B, L], of which lengths int32 [B] are kept."""
        mask_BL = jnp.arange(tokens_BL.shape[1]) < lengths_B[:, None]
        hidden_BLD = nnx.merge(self._graphdef, params)(tokens_BL, mask_BL)
        return unit(pool(hidden_BLD, mask_BL, self._pooling))

    def query_batches(self, texts: Sequence[str], row_counts: Sequence[int]) -> Iterator[tuple[int, Inputs]]:
        """See `TracedEncoder.query_batches`; all batches have the length of the longest text's bucket."""
        ids = self._tokenized(texts, "query")
        length = next(length for length in _lengths(self._max_length) if length >= max(map(len, ids)))
        most = max([rows for rows in row_counts if rows * length <= self._batch_tokens], default=row_counts[0])
        for start in range(0, len(ids), most):
            batch = ids[start : start + most]
            yield len(batch), _padded(batch, next(rows for rows in row_counts if rows >= len(batch)), length)

    def params_on(self, mesh: Mesh) -> Any:
        """See `TracedEncoder.params_on`; devices of this process that hold the parameters share them."""
        sharding = NamedSharding(mesh, PartitionSpec())

        def share(x: jax.Array) -> jax.Array:
            held = {shard.device: shard.data for shard in x.addressable_shards}
            copies = [held[device] for device in sharding.addressable_devices]
            return jax.make_array_from_single_device_arrays(x.shape, sharding, copies)

        return jax.tree.map(share, self._everywhere)

    def save(self, directory: Path) -> None:
        """Write path and settings to `encoder.json`: documentation for those who want to use the index again."""
        settings = {"kind": "bert", "path": str(self._path), **self._settings, "batch_tokens": self._batch_tokens}
        write_text(directory / ENCODER_FILE, json.dumps(settings, indent=1) + "\n")


def _padded(ids: Sequence[Sequence[int]], num_rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [num_rows, length], lengths int32 [num_rows]) of at most `num_rows` texts."""
    tokens_BL, lengths_B = np.zeros((num_rows, length), np.int32), np.zeros(num_rows, np.int32)
    for i, row in enumerate(ids):
        tokens_BL[i, : len(row)], lengths_B[i] = row, len(row)
    return tokens_BL, lengths_B


def _lengths(max_length: int) -> list[int]:
    """Row lengths of batches, ascending: 16, 32, 64, 96, 128, 192, 256, … below the maximum, and the maximum."""
    lengths = [_MIN_LENGTH]
    while lengths[-1] < max_length:
        power = 1 << (lengths[-1].bit_length() - 1)
        lengths.append(3 * power // 2 if lengths[-1] == power >= 64 else 2 * power)
    return [length for length in lengths if length < max_length] + [max_length]


def _fitting_batches(
    sizes: np.ndarray, max_length: int, batch_tokens: int, num_devices: int
) -> tuple[list[tuple[np.ndarray, int]], np.ndarray]:
    """(full batches, positions of the texts that remain) of texts of these sizes, from the longest to the shortest.

    A batch is (positions, length): as many texts as it has room for, or their largest multiple of `num_devices`. Its
    length, which decides the number of texts, is a multiple of 8 up to 128, of 16 up to 256, of 32 above, or the
    maximum.
    """
    steps = [*range(8, 128, 8), *range(128, 256, 16), *range(256, max_length, 32)]
    lengths = [length for length in steps if length < max_length] + [max_length]
    order = np.argsort(-sizes, kind="stable")
    batches: list[tuple[np.ndarray, int]] = []
    while len(order):
        length = lengths[np.searchsorted(lengths, sizes[order[0]])]
        num_rows = max(1, batch_tokens // length)
        num_rows -= num_rows % num_devices if num_rows > num_devices else 0
        if num_rows > len(order):
            break
        batches.append((order[:num_rows], length))
        order = order[num_rows:]
    return batches, np.sort(order)


def _row_counts(num_texts: int, max_rows: int, least: int) -> Iterator[int]:
    """Rows of the batches that hold `num_texts` texts: `least` times 1, 4, 16, …, at most a quarter of it padding.

    With least 1 and max_rows 64: 17 -> 16, 1;  31 -> 16, 16;  50 -> 64. Fewer than `least` texts are padded to it.
    """
    while num_texts > 0:
        rows = max(1, min(least, max_rows))
        while 4 * rows <= max_rows and 3 * rows <= num_texts:
            rows *= 4
        yield rows
        num_texts -= rows

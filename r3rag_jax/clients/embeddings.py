"""Embeddings of a server with OpenAI's `/v1/embeddings`: vLLM, Infinity, Text Embeddings Inference, OpenAI."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from r3rag_jax.clients.endpoint import Endpoint
from r3rag_jax.errors import UserError

PATH = "/embeddings"


class MalformedEmbeddingsError(ValueError):
    """A reply that breaks a rule; the message completes the sentence "the server must answer"."""


class EmbeddingsClient:
    """Embeds texts with one model, in several requests at a time; may be called from many threads."""

    def __init__(
        self, endpoint: Endpoint, *, batch_texts: int, encoding_format: Literal["base64", "float"], max_tokens: int = 0
    ):
        """
        Args:
            batch_texts: texts of a request.
            encoding_format: what is asked for; a server may answer in the other one.
            max_tokens: longer texts are truncated by the server, where it knows vLLM's field for that; 0: not asked.
        """
        self._endpoint, self._batch_texts = endpoint, batch_texts
        self._fields: dict[str, Any] = {"encoding_format": encoding_format}
        if max_tokens:
            self._fields["truncate_prompt_tokens"] = max_tokens

    @property
    def model(self) -> str:
        return self._endpoint.model

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), D], as the server returns them; [0, 0] for no texts.

        Raises:
            UserError: the server refuses, keeps failing, or its reply is malformed.
        """
        size = self._batch_texts
        batches = [texts[start : start + size] for start in range(0, len(texts), size)]
        endpoint = self._endpoint.separate()  # other threads call it, too
        found: dict[int, np.ndarray] = {}
        failure: UserError | None = None
        for number, vectors in endpoint.call_all(lambda batch: self._embed(endpoint, batch), batches):
            if isinstance(vectors, UserError):
                failure = failure or vectors
                endpoint.give_up()
            else:
                found[number] = vectors
        if failure is not None:
            raise failure
        rows = [found[number] for number in range(len(batches))]
        if len({row.shape[1] for row in rows}) > 1:
            sizes = sorted({row.shape[1] for row in rows})
            raise self._endpoint.malformed(PATH, "vectors of one size", sizes)
        return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)

    def _embed(self, endpoint: Endpoint, texts: Sequence[str]) -> np.ndarray:
        reply = endpoint.call(PATH, {"model": self.model, "input": list(texts)} | self._fields)
        try:
            return read_embeddings(reply, len(texts))
        except MalformedEmbeddingsError as error:
            raise self._endpoint.malformed(PATH, str(error), reply) from None


def read_embeddings(reply: Any, num_texts: int) -> np.ndarray:
    """The vectors of a reply in the order of the texts, float32 [num_texts, D].

    A vector is a list of numbers, or base64 of little-endian float32.

    Raises:
        MalformedEmbeddingsError: the reply is not one finite vector for each text, all of one size.
    """
    try:
        items = [(item["index"], item["embedding"]) for item in reply["data"]]
    except (KeyError, TypeError, IndexError):
        raise MalformedEmbeddingsError("data with index and embedding") from None
    indices = [index for index, _ in items]
    if any(type(index) is not int for index in indices) or sorted(indices) != list(range(num_texts)):
        raise MalformedEmbeddingsError(f"an embedding for each index below {num_texts}")
    vectors = [_vector(embedding) for _, embedding in sorted(items, key=lambda item: item[0])]
    if len({len(vector) for vector in vectors}) != 1 or not len(vectors[0]):
        raise MalformedEmbeddingsError("vectors of one size")
    array = np.stack(vectors)
    if not np.isfinite(array).all():
        raise MalformedEmbeddingsError("finite numbers")
    return array


def _vector(embedding: Any) -> np.ndarray:
    try:
        if isinstance(embedding, str):
            return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4").astype(np.float32)
        if not isinstance(embedding, list):
            raise TypeError
        with np.errstate(over="ignore"):  # too large for float32: infinity, which is refused
            vector = np.asarray(embedding, np.float64).astype(np.float32)
        if vector.ndim != 1:
            raise ValueError
        return vector
    except (TypeError, ValueError, OverflowError, binascii.Error):
        raise MalformedEmbeddingsError("embeddings as lists of numbers or base64 of float32") from None

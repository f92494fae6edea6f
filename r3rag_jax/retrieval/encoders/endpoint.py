"""A text encoder on a server with OpenAI's `/v1/embeddings`."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from r3rag_jax.clients.embeddings import EmbeddingsClient
from r3rag_jax.clients.endpoint import Endpoint
from r3rag_jax.config.retrieval import EncoderConfig
from r3rag_jax.errors import UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.retrieval.base import TextKind
from r3rag_jax.retrieval.fingerprint import digest
from r3rag_jax.run.files import write_text

PROBE_FILE = "encoder_probe.json"
PROBE = "The quick brown fox jumps over the lazy dog."
MIN_COSINE = 0.99  # of the probe's vectors; other hardware and dtypes of one model reach 0.999


class EndpointEncoder:
    """Vectors are of L2 norm 1, whether or not the server normalises; a blank text, which servers refuse, gets 0.

    The weights behind a model's name are not known, so an index keeps the vector of one probe text: a server that gives
    the probe another vector does not search it.
    """

    def __init__(self, config: EncoderConfig):
        """
        Raises:
            UserError: a URL is invalid, or the environment variable of the key is not set.
        """
        hint = "for a server that takes no base64: retrieval.encoder.encoding_format=float"
        endpoint = Endpoint(config.endpoint, name="retrieval.encoder.endpoint", hints=dict.fromkeys((400, 422), hint))
        self._client = EmbeddingsClient(
            endpoint, batch_texts=config.batch_texts, encoding_format=config.encoding_format,
            max_tokens=config.max_length,
        )  # fmt: skip
        asked: dict[TextKind, str] = {"query": config.query_prefix, "passage": config.passage_prefix}
        self._prefixes = {kind: "" if prefix == "auto" else prefix for kind, prefix in asked.items()}
        self._max_length = config.max_length

    @property
    def cosine_kind(self) -> TextKind:
        """Passages are always encoded as passages."""
        return "passage"

    @property
    def dim(self) -> int:
        """Size of the vectors; the server is asked once.

        Raises:
            UserError: it does not answer, or not with a vector.
        """
        return len(self._probe)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the model's name, the vectors' size, and the settings; not of where it is served."""
        texts = [self._client.model, self.dim, self._prefixes["query"], self._prefixes["passage"], self._max_length]
        return digest(["endpoint", *map(str, texts)])

    def encode(self, texts: Sequence[str], *, kind: TextKind = "query") -> np.ndarray:
        """See `Encoder.encode`.

        Raises:
            UserError: the server refuses, keeps failing, or its reply is malformed.
        """
        prefix, size = self._prefixes[kind], self.dim
        rows = [row for row, text in enumerate(texts) if text.strip()]
        vectors_ND = np.zeros((len(texts), size), np.float32)
        if rows:
            found_RD = self._client.embed([prefix + texts[row] for row in rows])
            if found_RD.shape[1] != size:
                raise UserError(f"retrieval.encoder.endpoint must answer vectors of {size}; got {found_RD.shape[1]}")
            vectors_ND[rows] = normalized(found_RD)
        return vectors_ND

    def save(self, directory: Path) -> None:
        """Write the probe's vector."""
        row = {"model": self._client.model, "text": PROBE, "vector": self._probe.tolist()}
        write_text(directory / PROBE_FILE, json.dumps(row) + "\n")

    def check_index(self, directory: Path) -> None:
        """Compare the server's vector of the probe with that of an index, where it has one.

        Raises:
            UserError: the server's model is not the one that the index was built with.
        """
        file = directory / PROBE_FILE
        if not file.is_file():
            return
        try:
            row = parse_json(file.read_text(encoding="utf-8"))
            model, saved_D = str(row["model"]), np.asarray(row["vector"], np.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} must hold a model and its vector: {error}. Build the index again.") from None
        cosine = float(saved_D @ self._probe) if saved_D.shape == self._probe.shape else float("nan")
        if not cosine >= MIN_COSINE:
            raise UserError(
                f"retrieval.encoder.endpoint must serve {model}, which {directory} was built with; the cosine of its "
                f"vector for a probe with the index's must be at least {MIN_COSINE}; got {cosine:.4f}, sizes "
                f"{saved_D.size} and {self._probe.size}"
            )

    @functools.cached_property
    def _probe(self) -> np.ndarray:
        """float32 [D]: the vector of the probe, without prefix."""
        return normalized(self._client.embed([PROBE]))[0]


def normalized(vectors_ND: np.ndarray) -> np.ndarray:
    """Rows of norm 1; rows of 0 stay."""
    norms_N1 = np.linalg.norm(vectors_ND.astype(np.float64), axis=1, keepdims=True)
    return (vectors_ND / np.where(norms_N1 > 0, norms_N1, 1)).astype(np.float32)

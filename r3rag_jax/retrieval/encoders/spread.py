"""Passages of an index encoded by all processes of a run: process 0 sends them texts and collects their vectors."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.crew import Crew, serve
from r3rag_jax.retrieval.base import Encoder, TextKind
from r3rag_jax.retrieval.encoders.factory import new_local_encoder

NAME = "encode"
MIN_TEXTS = 64  # for each process; fewer are encoded by process 0 alone

Spread = Callable[[Encoder], Encoder]


class SpreadEncoder:
    """An encoder of process 0 that encodes many passages on all processes, each of which has the same encoder.

    Each process has a run of the texts, in order. Vectors are those of the encoder but for the rounding of batches of
    another shape.
    """

    def __init__(self, encoder: Encoder, crew: Crew):
        self._encoder, self._crew = encoder, crew
        self.save = encoder.save

    @property
    def dim(self) -> int:
        """See `Encoder.dim`."""
        return self._encoder.dim

    @property
    def fingerprint(self) -> str:
        """That of the encoder: which process made a vector does not matter."""
        return self._encoder.fingerprint

    @property
    def cosine_kind(self) -> TextKind:
        """See `Encoder.cosine_kind`."""
        return self._encoder.cosine_kind

    def encode(self, texts: Sequence[str], *, kind: TextKind = "query") -> np.ndarray:
        """See `Encoder.encode`."""
        size = self._crew.size
        if kind != "passage" or len(texts) < size * MIN_TEXTS:
            return self._encoder.encode(texts, kind=kind)
        bounds = [len(texts) * rank // size for rank in range(size + 1)]
        parts = [_pack(self.fingerprint, texts[start:stop]) for start, stop in itertools.pairwise(bounds)]
        made = self._crew.run(parts, functools.partial(_encode, lambda: self._encoder))
        return np.concatenate([np.frombuffer(vectors, np.float32).reshape(-1, self.dim) for vectors in made])


@contextlib.contextmanager
def encoding_together(config: RetrievalConfig) -> Iterator[Spread]:
    """While process 0 runs the block, the other processes encode for it; they run the block afterwards.

    Yields:
        What makes an encoder one of all processes: nothing where there is one process, or where an encoder depends on
        the passages or is a server's.
    """
    if jax.process_count() == 1 or config.encoder.kind != "bert":
        yield lambda encoder: encoder
    elif jax.process_index() == 0:
        crew = Crew(NAME)
        try:
            yield lambda encoder: SpreadEncoder(encoder, crew)
        finally:
            crew.close()
    else:
        opened = functools.cache(lambda: new_local_encoder(config))
        serve(NAME, functools.partial(_encode, opened))
        yield lambda encoder: encoder


def _pack(fingerprint: str, texts: Sequence[str]) -> bytes:
    return json.dumps([fingerprint, list(texts)]).encode()


def _encode(encoder: Callable[[], Encoder], part: bytes) -> bytes:
    """The vectors of a part, float32 [N, D].

    Raises:
        UserError: this process has another encoder than process 0.
    """
    fingerprint, texts = json.loads(part)
    if encoder().fingerprint != fingerprint:
        raise UserError(
            f"all hosts must have the same encoder at retrieval.encoder.path; that of process {jax.process_index()} "
            "is another than that of process 0"
        )
    return np.ascontiguousarray(encoder().encode(texts, kind="passage"), np.float32).tobytes()

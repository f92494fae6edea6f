"""The contract of an encoder whose model can be traced into a larger device program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

Inputs = tuple[np.ndarray, ...]  # of `embed`, for a batch of texts; each array has a row per text


@runtime_checkable
class TracedEncoder(Protocol):
    """What `retrieval/device.py` asks of an encoder, to encode queries in the program that searches for them."""

    def query_batches(self, texts: Sequence[str], row_counts: Sequence[int]) -> Iterator[tuple[int, Inputs]]:
        """Yield (number of texts, inputs) of consecutive queries, filled up to one of `row_counts`, ascending."""
        ...

    def embed(self, params: Any, *inputs: jax.Array) -> jax.Array:
        """Return the vectors of a batch, float32 [B, D]. Traced."""
        ...

    def params_on(self, mesh: Mesh) -> Any:
        """Return `params`, held by every device of the mesh."""
        ...

"""The decode state: one pytree, every field with a shape."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax
import numpy as np

from r3rag_jax.sampler.cache.kv_cache import KVCache


class RowStatus(enum.IntEnum):
    """What a slot is doing."""

    EMPTY = 0  # the host has read what it wrote; it may be given a context
    ACTIVE = 1  # being decoded
    NEEDS_RETRIEVAL = 2  # paused behind a token after which the host has the word
    DONE = 3  # wrote a stop token, or ran out of budget


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The control part of the state: numpy on the host, which rewrites it, jax.Array inside device calls."""

    tokens: Any  # int32 [B, S], ids of the row, right-padded
    lengths: Any  # int32 [B], tokens known; the cache holds tokens[: length - 1] at least
    status: Any  # int32 [B], RowStatus
    budgets: Any  # int32 [B], tokens that may still be sampled
    keys: Any  # uint32 [B, 2], the row's own PRNG key, folded with the position
    temperature: Any  # float32 [B], 0 = greedy
    logprobs: Any  # float32 [B, S], of sampled tokens, at the sampling temperature
    logprobs_t1: Any  # float32 [B, S], the same at temperature 1

    @classmethod
    def empty(cls, num_rows: int, max_length: int) -> Rows:
        wide = (num_rows, max_length)
        return cls(
            tokens=np.zeros(wide, np.int32),
            lengths=np.ones(num_rows, np.int32),
            status=np.full(num_rows, RowStatus.EMPTY, np.int32),
            budgets=np.zeros(num_rows, np.int32),
            keys=np.zeros((num_rows, 2), np.uint32),
            temperature=np.zeros(num_rows, np.float32),
            logprobs=np.zeros(wide, np.float32),
            logprobs_t1=np.zeros(wide, np.float32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything a decode call reads and writes."""

    cache: KVCache
    rows: Rows

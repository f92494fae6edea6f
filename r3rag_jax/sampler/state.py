"""The decode state: what the host keeps of every row, and the pytree of one call on the device."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax
import numpy as np

from r3rag_jax.sampler.cache.kv_cache import KVCache


class RowStatus(enum.IntEnum):
    """What a slot is doing."""

    EMPTY = 0  # free: the host has read what it sampled and may set a context
    ACTIVE = 1  # being decoded
    NEEDS_RETRIEVAL = 2  # paused at a token that hands control to the host
    DONE = 3  # sampled a stop token, or ran out of budget


@dataclasses.dataclass(frozen=True)
class Rows:
    """All rows on the host, which rewrites the arrays in place."""

    tokens: np.ndarray  # int32 [B, S], ids of the row, right-padded
    lengths: np.ndarray  # int32 [B], tokens known; the cache holds at least tokens[: length - 1]
    status: np.ndarray  # int32 [B], RowStatus
    budgets: np.ndarray  # int32 [B], tokens that may still be sampled
    keys: np.ndarray  # uint32 [B, 2], the row's own PRNG key, folded with the position
    temperature: np.ndarray  # float32 [B], 0 = greedy
    logprobs: np.ndarray  # float32 [B, S], of sampled tokens, under the distribution sampled from

    @classmethod
    def empty(cls, num_rows: int, max_length: int) -> Rows:
        return cls(
            tokens=np.zeros((num_rows, max_length), np.int32),
            lengths=np.ones(num_rows, np.int32),
            status=np.full(num_rows, RowStatus.EMPTY, np.int32),
            budgets=np.zeros(num_rows, np.int32),
            keys=np.zeros((num_rows, 2), np.uint32),
            temperature=np.zeros(num_rows, np.float32),
            logprobs=np.zeros((num_rows, max_length), np.float32),
        )

    def decode_rows(self, rows: np.ndarray, max_tokens: int) -> DecodeRows:
        """The control part of some rows (int32 [R]) for a call that samples at most `max_tokens` (T) each."""
        return DecodeRows(
            last_tokens=self.tokens[rows, self.lengths[rows] - 1],
            lengths=self.lengths[rows],
            status=self.status[rows],
            budgets=self.budgets[rows],
            keys=self.keys[rows],
            temperature=self.temperature[rows],
            tokens=np.zeros((len(rows), max_tokens), np.int32),
            logprobs=np.zeros((len(rows), max_tokens), np.float32),
        )

    def update(self, rows: np.ndarray, decoded: DecodeRows) -> None:
        """Take over what a call has sampled for some rows."""
        for i, row in enumerate(rows):
            start, end = int(self.lengths[row]), int(decoded.lengths[i])
            self.tokens[row, start:end] = decoded.tokens[i, : end - start]
            self.logprobs[row, start:end] = decoded.logprobs[i, : end - start]
        self.lengths[rows], self.status[rows] = decoded.lengths, decoded.status
        self.budgets[rows] = decoded.budgets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeRows:
    """The control part of a decode call, R rows: small, since it crosses between host and device with every call."""

    last_tokens: Any  # int32 [R], the token that the next step feeds
    lengths: Any  # int32 [R]
    status: Any  # int32 [R], RowStatus
    budgets: Any  # int32 [R]
    keys: Any  # uint32 [R, 2]
    temperature: Any  # float32 [R]
    tokens: Any  # int32 [R, T], sampled in this call, right-padded
    logprobs: Any  # float32 [R, T], of these


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything a decode call reads and writes."""

    cache: KVCache
    rows: DecodeRows

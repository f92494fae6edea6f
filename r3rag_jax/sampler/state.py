"""The decode state: `Rows` on the host, and the pytrees that one device call reads and writes."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax
import numpy as np

from r3rag_jax.sampler.cache.kv_cache import KVCache


class RowStatus(enum.IntEnum):
    """Status of a slot."""

    EMPTY = 0  # free: the host may set a new context
    ACTIVE = 1  # is being decoded
    NEEDS_RETRIEVAL = 2  # paused after a pause token: the host continues or ends it
    DONE = 3  # ended: a stop token or stop string, or no budget left
    HELD = 4  # active, but left out of decode calls until the host makes it ACTIVE again


@dataclasses.dataclass(frozen=True)
class Rows:
    """State of all rows on the host; the arrays are updated in place."""

    tokens: np.ndarray  # int32 [B, S], ids of the row, right-padded
    lengths: np.ndarray  # int32 [B], number of tokens; the cache holds at least tokens[: length - 1]
    status: np.ndarray  # int32 [B], RowStatus
    budgets: np.ndarray  # int32 [B], tokens that may still be sampled
    keys: np.ndarray  # uint32 [B, 2], PRNG key of the row; each step folds in the position
    temperature: np.ndarray  # float32 [B], 0 = greedy
    logprobs: np.ndarray  # float32 [B, S], of sampled tokens under the sampling distribution; else undefined

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
        """The state of rows (int32 [R]) for a device call that samples at most `max_tokens` (T) per row."""
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
        """Copy the results of a device call on rows (int32 [R]) into this state."""
        for i, row in enumerate(rows):
            start, end = int(self.lengths[row]), int(decoded.lengths[i])
            self.tokens[row, start:end] = decoded.tokens[i, : end - start]
            self.logprobs[row, start:end] = decoded.logprobs[i, : end - start]
        self.lengths[rows], self.status[rows] = decoded.lengths, decoded.status
        self.budgets[rows] = decoded.budgets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeRows:
    """State of R rows in a decode call, without the cache: it moves between host and device in every call."""

    last_tokens: Any  # int32 [R], the input token of the next step
    lengths: Any  # int32 [R]
    status: Any  # int32 [R], RowStatus
    budgets: Any  # int32 [R]
    keys: Any  # uint32 [R, 2]
    temperature: Any  # float32 [R]
    tokens: Any  # int32 [R, T], sampled in this call, right-padded
    logprobs: Any  # float32 [R, T], of `tokens`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The carry of the decode loop and the result of a decode call."""

    cache: KVCache
    rows: DecodeRows

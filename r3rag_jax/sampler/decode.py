"""The functions that the sampler jits: prefill, row copies, and the bounded decode loop."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from r3rag_jax.sampler.cache.base import Extent
from r3rag_jax.sampler.cache.kv_cache import KVCache
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.distribution import Truncation
from r3rag_jax.sampler.exchange import ALONE, Exchange
from r3rag_jax.sampler.sampling import sample
from r3rag_jax.sampler.state import DecodeRows, DecodeState, RowStatus


def prefill(
    decoder: CachedDecoder,
    cache: KVCache,
    rows_WR: jax.Array,
    tokens_WRC: jax.Array,
    starts_WR: jax.Array,
    exchange: Exchange = ALONE,
) -> KVCache:
    """Write the keys and values of C tokens per row; returns the new cache.

    The cache's rows are split over W devices, and every device prefills R rows of its own: it sees W = 1.

    Args:
        rows_WR: int32, row indices relative to the device's first row; out-of-range rows are not written.
        tokens_WRC: int32; token c of a row takes position starts_WR + c.
        starts_WR: int32, position of each row's first token.
        exchange: see `CachedDecoder.extend`.
    """
    [rows_R], [tokens_RC], [starts_R] = rows_WR, tokens_WRC, starts_WR
    is_row = rows_R < cache.num_rows
    starts_R = jnp.where(is_row, starts_R, jnp.max(starts_R, where=is_row, initial=0))
    extent = Extent(jnp.min(starts_R) + 1, jnp.max(starts_R) + tokens_RC.shape[1])
    return decoder.extend(cache, tokens_RC, starts_R, rows_R, extent, exchange)[0]


def copy(cache: KVCache, sources_WR: jax.Array, rows_WR: jax.Array) -> KVCache:
    """Copy the keys and values of rows sources_WR to rows_WR of the same device; see `prefill` for these indices."""
    [sources_R], [rows_R] = sources_WR, rows_WR
    return cache.put(rows_R, cache.take(sources_R))


def decode(
    decoder: CachedDecoder,
    cache: KVCache,
    cache_rows: jax.Array,
    rows: DecodeRows,
    max_tokens: jax.Array,
    leave_at: jax.Array,
    stop_ids: jax.Array,
    pause_ids: jax.Array,
    truncation: Truncation,
    positions: int,
    exchange: Exchange = ALONE,
) -> DecodeState:
    """Decode R rows until `max_tokens` are sampled, no row is active, or `leave_at` rows have paused or ended.

    If the cache is not read in place, the loop runs on a copy of the R rows and their first `positions` positions,
    which is written back at the end.

    Args:
        cache_rows: int32 [R], indices of the cache rows to decode, ascending.
        rows: the decode state of these rows.
        max_tokens: int32 [], at most T, the width of `rows.tokens`.
        leave_at: int32 [], number of rows.
        stop_ids: int32 [MAX_STOPS], tokens that end the decoding of a row, `pause_ids` included.
        pause_ids: int32 [MAX_STOPS], tokens after which a row waits for the host (NEEDS_RETRIEVAL).
        positions: number of leading positions that are read and written; it must cover every active row.
        exchange: see `CachedDecoder.extend`.
    """
    is_in_place, taken = cache.is_read_in_place, None if len(cache_rows) == cache.num_rows else cache_rows

    def num_active(rows: DecodeRows) -> jax.Array:
        return exchange.total(jnp.sum(rows.status == RowStatus.ACTIVE))

    def is_going(carry: tuple[jax.Array, jax.Array, DecodeState]) -> jax.Array:
        number, active, _ = carry
        return (number < max_tokens) & (active > 0) & (num_before - active < leave_at)

    def draw(logits: jax.Array, rows: DecodeRows) -> tuple[jax.Array, jax.Array]:
        logits = logits[:, : decoder.config.vocab_size]  # without the padding of a mesh
        return sample(logits, rows, truncation, decoder.ops.target.can_branch)

    def step(carry: tuple[jax.Array, jax.Array, DecodeState]) -> tuple[jax.Array, jax.Array, DecodeState]:
        number, _, state = carry
        rows, num_rows = state.rows, state.cache.num_rows
        read = jnp.where(rows.status == RowStatus.ACTIVE, cache_rows, num_rows) if is_in_place else None
        tokens = rows.last_tokens[:, None]
        cache, hidden = decoder.extend(state.cache, tokens, rows.lengths - 1, read, exchange=exchange)
        token, logprob = exchange.sample(draw, decoder.logits(hidden[:, 0], exchange), rows)
        rows = append(rows, number, token, logprob, stop_ids, pause_ids)
        return number + 1, num_active(rows), DecodeState(cache, rows)

    num_before = num_active(rows)
    window = cache if is_in_place else cache.take(taken, positions)
    state: DecodeState = jax.lax.while_loop(is_going, step, (jnp.int32(0), num_before, DecodeState(window, rows)))[2]
    return state if is_in_place else DecodeState(cache.put(taken, state.cache), state.rows)


def append(
    rows: DecodeRows,
    number: jax.Array,
    token: jax.Array,
    logprob: jax.Array,
    stop_ids: jax.Array,
    pause_ids: jax.Array,
) -> DecodeRows:
    """Record the token that each active row sampled in step `number` of the decode call, and update its status.

    A row that is active now was active in all earlier steps of the call, so its token goes to column `number`.

    Args:
        number: int32 []. token: int32 [R]. logprob: float32 [R]. Values of inactive rows are ignored.
        stop_ids, pause_ids: see `decode`.
    """
    active = rows.status == RowStatus.ACTIVE
    budgets = rows.budgets - active
    status = jnp.where(jnp.isin(token, stop_ids) | (budgets <= 0), RowStatus.DONE, RowStatus.ACTIVE)
    status = jnp.where(jnp.isin(token, pause_ids), RowStatus.NEEDS_RETRIEVAL, status)

    def record(to: jax.Array, value: jax.Array) -> jax.Array:
        column = jnp.where(active, value, 0).astype(to.dtype)[:, None]
        return jax.lax.dynamic_update_slice_in_dim(to, column, number, axis=1)

    return dataclasses.replace(
        rows,
        last_tokens=jnp.where(active, token, rows.last_tokens),
        lengths=rows.lengths + active,
        budgets=budgets,
        status=jnp.where(active, status, rows.status).astype(jnp.int32),
        tokens=record(rows.tokens, token),
        logprobs=record(rows.logprobs, logprob),
    )

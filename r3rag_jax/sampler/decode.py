"""The functions that the sampler jits: prefill, row copies, and the bounded decode loop."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from r3rag_jax.sampler.cache.base import Extent
from r3rag_jax.sampler.cache.kv_cache import KVCache
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.distribution import Truncation
from r3rag_jax.sampler.sampling import sample
from r3rag_jax.sampler.state import DecodeRows, DecodeState, RowStatus


def prefill(
    decoder: CachedDecoder, cache: KVCache, rows_WR: jax.Array, tokens_WRC: jax.Array, starts_WR: jax.Array
) -> KVCache:
    """Write the keys and values of C tokens per row; returns the new cache.

    The cache's rows are split over W devices, and every device prefills R rows of its own.

    Args:
        rows_WR: int32, row indices relative to the device's first row; out-of-range rows are not written.
        tokens_WRC: int32; token c of a row takes position starts_WR + c.
        starts_WR: int32, position of each row's first token.
    """
    ways, _, length = tokens_WRC.shape
    is_row = rows_WR < cache.num_rows // ways
    starts_WR = jnp.where(is_row, starts_WR, jnp.max(starts_WR, where=is_row, initial=0))
    extent = Extent(
        jnp.min(starts_WR) + 1, jnp.max(starts_WR) + length
    )  # equal on all devices, so that their loops have equal lengths
    if ways == 1:
        return decoder.extend(cache, tokens_WRC[0], starts_WR[0], rows_WR[0], extent)[0]
    by_device = jax.tree.map(lambda x: x.reshape(ways, -1, *x.shape[1:]), cache)

    def extend(cache: KVCache, tokens_RC: jax.Array, starts_R: jax.Array, rows_R: jax.Array) -> KVCache:
        return decoder.extend(cache, tokens_RC, starts_R, rows_R, extent)[0]

    written = jax.vmap(extend)(by_device, tokens_WRC, starts_WR, rows_WR)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), written)


def copy(cache: KVCache, sources_R: jax.Array, rows_R: jax.Array) -> KVCache:
    """Copy the keys and values of cache rows sources_R to rows_R (int32 [R]); rows >= B are not written."""
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
    """
    num_active = jnp.sum(rows.status == RowStatus.ACTIVE)
    is_in_place, taken = cache.is_read_in_place, None if len(cache_rows) == cache.num_rows else cache_rows

    def is_going(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        number, state = carry
        active = jnp.sum(state.rows.status == RowStatus.ACTIVE)
        return (number < max_tokens) & (active > 0) & (num_active - active < leave_at)

    def step(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        number, state = carry
        rows, num_rows = state.rows, state.cache.num_rows
        read = jnp.where(rows.status == RowStatus.ACTIVE, cache_rows, num_rows) if is_in_place else None
        cache, hidden = decoder.extend(state.cache, rows.last_tokens[:, None], rows.lengths - 1, read)
        logits = decoder.logits(hidden[:, 0])
        token, logprob = sample(logits, rows, truncation, decoder.ops.target.can_branch)
        return number + 1, DecodeState(cache, append(rows, number, token, logprob, stop_ids, pause_ids))

    window = cache if is_in_place else cache.take(taken, positions)
    state: DecodeState = jax.lax.while_loop(is_going, step, (jnp.int32(0), DecodeState(window, rows)))[1]
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

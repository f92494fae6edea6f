"""The sampler's programs on the device: prefill, copies of rows, and the bounded decode loop."""

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
    """Write keys and values of tokens_WRC at positions starts_WR + 0..C-1 of the given rows.

    The cache's rows are split over W devices and rows_WR count from the first row of each, so that every device works
    on its own rows. Rows beyond its last are not written.
    """
    ways, _, length = tokens_WRC.shape
    is_row = rows_WR < cache.num_rows // ways
    starts_WR = jnp.where(is_row, starts_WR, jnp.max(starts_WR, where=is_row, initial=0))
    extent = Extent(jnp.min(starts_WR) + 1, jnp.max(starts_WR) + length)  # the same on all devices, for their loops
    if ways == 1:
        return decoder.extend(cache, tokens_WRC[0], starts_WR[0], rows_WR[0], extent)[0]
    apart = jax.tree.map(lambda x: x.reshape(ways, -1, *x.shape[1:]), cache)

    def extend(cache: KVCache, tokens_RC: jax.Array, starts_R: jax.Array, rows_R: jax.Array) -> KVCache:
        return decoder.extend(cache, tokens_RC, starts_R, rows_R, extent)[0]

    written = jax.vmap(extend)(apart, tokens_WRC, starts_WR, rows_WR)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), written)


def copy(cache: KVCache, sources_R: jax.Array, rows_R: jax.Array) -> KVCache:
    """Copy keys and values from source rows to rows; rows >= B are not written."""
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
    """Decode until `max_tokens` are sampled, no row is active, or `leave_at` rows have paused or ended.

    A cache that is read in place is worked on where it lies; of another one a part is taken for the loop and put back.

    Args:
        cache_rows: int32 [R], the rows of the cache to work on, ascending. rows: their control part.
        max_tokens: at most T, the width of `rows.tokens`.
        stop_ids: tokens that end a step, pauses included. pause_ids: those that hand control to the host.
        positions: what active rows can reach; positions beyond are neither read nor written.
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

    part = cache if is_in_place else cache.take(taken, positions)
    state: DecodeState = jax.lax.while_loop(is_going, step, (jnp.int32(0), DecodeState(part, rows)))[1]
    return state if is_in_place else DecodeState(cache.put(taken, state.cache), state.rows)


def append(
    rows: DecodeRows,
    number: jax.Array,
    token: jax.Array,
    logprob: jax.Array,
    stop_ids: jax.Array,
    pause_ids: jax.Array,
) -> DecodeRows:
    """Record the token that every active row has sampled in step `number` of the call, and update its status.

    A row that is active has been so since the call began: its tokens of the call fill the columns up to `number`.
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

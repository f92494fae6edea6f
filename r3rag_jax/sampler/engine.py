"""The sampler: slots with a KV cache, chunked prefill, bounded decode that pauses at retrieval calls.

The cache always holds keys and values of a row's tokens[: length - 1]; a decode step feeds the last
token and samples the next. So a prefill never needs logits, and appending passages to a paused row
prefills the passages alone: `set_context` keeps the longest common prefix of old and new ids.

Recorded log-probabilities are those of the distribution sampled from, at the row's temperature and truncated; training
forms the same one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.parallel.shardings import batch_shardings, batch_ways, device_put_batch, device_put_global, replicated
from r3rag_jax.sampler.cache.base import Extent, padded
from r3rag_jax.sampler.cache.kv_cache import KVCache
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.distribution import WHOLE, Truncation, truncate
from r3rag_jax.sampler.ops import SamplerOps
from r3rag_jax.sampler.state import DecodeState, Rows, RowStatus
from r3rag_jax.sampler.stops import NO_STOPS, EndOf, StopTokens
from r3rag_jax.types import Context

# Of a decode call: shares of the cache's positions and rows (one over this) that it may read, and the fewest positions.
SPAN_SHARES, ROW_SHARES, MIN_SPAN = (8, 4, 2, 1), (4, 2), 64
VOCAB_BLOCK = 64  # tokens of the vocabulary that `first_largest` and `invert` take together


class PrefillShapes(NamedTuple):
    """Tokens of a prefill call."""

    lengths: tuple[int, ...]  # of a row
    totals: tuple[int, ...]  # of a device


CPU_SHAPES = PrefillShapes(lengths=(32, 48, 64, 96, 128), totals=(128, 512))
ACCELERATOR_SHAPES = PrefillShapes(lengths=(32, 128, 512), totals=(512, 4096))


class Engine:
    """A fixed number of slots over one model. What `load` gives is passed with each call, never held."""

    def __init__(
        self,
        graphdef: Any,
        config: DecoderConfig,
        mesh: Mesh,
        *,
        slots: int,
        max_length: int,
        truncation: Truncation = WHOLE,
        dtype: Any = jnp.float32,
        split_weights: bool = False,
        ops: SamplerOps | None = None,
    ):
        """A sampler of `slots` rows of `max_length` tokens.

        Args:
            dtype: of keys and values.
            split_weights: see `CachedDecoder.shardings`.
            ops: None: the fastest on the mesh's devices.
        """
        self.mesh, self.slots, self.max_length = mesh, slots, max_length
        self.rows = Rows.empty(slots, max_length)
        self._starts = np.zeros(slots, np.int32)  # length of each row's context
        ops = SamplerOps.of(mesh) if ops is None else ops
        cache_of = functools.partial(KVCache.init, config, slots, padded(max_length), dtype, ops)
        cache = jax.eval_shape(cache_of)
        self._shardings = DecodeState(cache=cache.shardings(mesh), rows=batch_shardings(mesh, self.rows))
        self._cache = jax.jit(cache_of, out_shardings=self._shardings.cache)()

        def load(params: Any) -> CachedDecoder:
            decoder = jax.tree.map(jnp.copy, CachedDecoder.of(nnx.merge(graphdef, params), ops))
            return jax.lax.with_sharding_constraint(decoder, decoder.shardings(mesh, split_weights))

        self._load = jax.jit(load)
        whole = jax.tree.map(lambda _: replicated(mesh), self._shardings.rows)
        self._ways = batch_ways(mesh, slots)
        self._prefill_shapes = CPU_SHAPES if ops.target.is_cpu else ACCELERATOR_SHAPES
        self._windows = windows(cache, mesh, max_length)
        self._decode = jax.jit(
            functools.partial(decode, truncation=truncation),
            static_argnames="positions",
            donate_argnums=1,  # the cache; rows come back whole, in another layout
            out_shardings=DecodeState(cache=self._shardings.cache, rows=whole),
        )
        self._prefill = jax.jit(prefill, donate_argnums=1, out_shardings=self._shardings.cache)
        self._copy = jax.jit(copy, donate_argnums=0, out_shardings=self._shardings.cache)
        self._needs_warm_up = not ops.target.is_cpu
        self.num_prefilled = 0  # tokens, padding not counted
        self.num_sampled = 0

    def load(self, params: Any) -> CachedDecoder:
        """A copy of the parameters as the engine reads them; `params` may be donated afterwards.

        On an accelerator, where each program takes seconds to compile, the first call compiles all of them.
        """
        decoder = self._load(params)
        if self._needs_warm_up:
            self.warm_up(decoder)
        return decoder

    def warm_up(self, decoder: CachedDecoder) -> None:
        """Compile every program that there is for this engine, 19 at most (on an accelerator 15), in threads."""
        nothing = np.zeros(self.slots, np.int32)
        calls = [functools.partial(self._copy.lower, self._cache, nothing, nothing)]
        for width, size in ((w, size) for w in self._prefill_shapes.lengths for size in self._prefill_sizes(w)):
            chunk = device_put_batch(self.mesh, self._chunk(size, width))
            calls.append(functools.partial(self._prefill.lower, decoder, self._cache, *chunk))
        for window in self._windows:
            args = self._decode_args(np.arange(window.rows, dtype=np.int32), 0, 1, NO_STOPS)
            calls.append(functools.partial(self._decode.lower, decoder, self._cache, *args, positions=window.positions))
        with ThreadPoolExecutor(len(calls)) as pool:
            list(pool.map(lambda lower: lower().compile(), calls))  # jit finds them there
        self._needs_warm_up = False

    def reset(self) -> None:
        """Forget all rows; needed when the parameters change, for the cache is then stale."""
        self.rows = Rows.empty(self.slots, self.max_length)

    def set_context(self, decoder: CachedDecoder, contexts: Mapping[int, Context]) -> None:
        """Give rows new contexts and make them ACTIVE; only what the cache lacks is prefilled.

        Where several rows begin with the same context, as the samples of a question do, one of them is prefilled and
        its keys and values are copied on the device.
        """
        todo: list[tuple[int, Sequence[int], int]] = []
        first: dict[tuple[int, ...], int] = {}  # context -> the row that is prefilled with it
        copies: list[tuple[int, int]] = []  # from, to
        for row, context in contexts.items():
            length = len(context.ids)
            if not 1 <= length < self.max_length:
                raise ValueError(f"a context must hold 1 to {self.max_length - 1} tokens; got {length}")
            kept = self._common_prefix(row, context.ids)
            if kept < length - 1:
                source = first.setdefault(tuple(context.ids), row)
                if source == row:
                    todo.append((row, context.ids, kept))
                else:
                    copies.append((source, row))
            rows = self.rows
            rows.tokens[row, :length] = context.ids
            rows.lengths[row] = self._starts[row] = length
            rows.status[row] = RowStatus.ACTIVE
            rows.budgets[row] = min(context.budget, self.max_length - length)
            rows.temperature[row] = context.temperature
            rows.keys[row] = 0 if context.key is None else context.key
        while todo:
            todo = self._prefill_once(decoder, todo)
        if copies:
            sources, targets = np.zeros(self.slots, np.int32), np.full(self.slots, self.slots, np.int32)
            sources[: len(copies)], targets[: len(copies)] = np.transpose(copies)  # the rest is dropped
            self._cache = self._copy(self._cache, sources, targets)

    def decode(self, decoder: CachedDecoder, max_tokens: int, leave_at: int, stops: StopTokens = NO_STOPS) -> None:
        """Sample up to `max_tokens` per active row; leaves as soon as `leave_at` rows have paused or ended.

        A step takes time by the rows and positions that it can see: the call works on those of the cache that it needs.
        """
        active = self.find(RowStatus.ACTIVE)
        if not active:
            return
        before = self.rows.lengths.copy()
        reach = int(np.max(self.rows.lengths[active] + np.minimum(max_tokens, self.rows.budgets[active])))
        window = next(w for w in self._windows if w.rows >= len(active) and w.positions >= reach)
        others = np.setdiff1d(np.arange(self.slots), active)[: window.rows - len(active)]
        self._decode_once(decoder, max_tokens, leave_at, stops, np.union1d(active, others), window.positions)
        if stops.end_of is not None:
            self._stop_at_strings(active, stops.end_of)
        self.num_sampled += int((self.rows.lengths - before).sum())

    def _stop_at_strings(self, rows: Sequence[int], end_of: EndOf) -> None:
        for row in rows:
            start, end = int(self._starts[row]), int(self.rows.lengths[row])
            if num_kept := end_of(self.rows.tokens[row, start:end].tolist()):
                if start + num_kept < end or self.rows.status[row] == RowStatus.ACTIVE:
                    self.rows.status[row] = RowStatus.DONE
                self.rows.lengths[row] = start + num_kept

    def _decode_once(
        self,
        decoder: CachedDecoder,
        max_tokens: int,
        leave_at: int,
        stops: StopTokens,
        places: np.ndarray,
        positions: int,
    ) -> None:
        """One call on the rows at `places`, ascending; see `decode` of this module."""
        places = places.astype(np.int32)
        args = self._decode_args(places, max_tokens, leave_at, stops)
        state = self._decode(decoder, self._cache, *args, positions=positions)
        self._cache = state.cache
        for mine, new in zip(jax.tree.leaves(self.rows), jax.tree.leaves(state.rows), strict=True):
            mine[places] = new

    def _decode_args(self, places: np.ndarray, max_tokens: int, leave_at: int, stops: StopTokens) -> tuple[Any, ...]:
        """What `decode` of this module takes behind the cache, but for the positions."""
        rows = device_put_global(jax.tree.map(lambda x: x[places], self.rows), self._shardings.rows)
        return places, rows, np.int32(max_tokens), np.int32(leave_at), stops.all_ids, stops.padded_pause_ids

    def release(self, row: int) -> None:
        """Free a slot; its cache stays for a context with a common prefix."""
        self.rows.status[row] = RowStatus.EMPTY

    def find(self, *status: RowStatus) -> list[int]:
        return np.flatnonzero(np.isin(self.rows.status, status)).tolist()

    def _common_prefix(self, row: int, ids: Sequence[int]) -> int:
        """Tokens of `ids` whose keys and values are in the row's cache."""
        cached = min(int(self.rows.lengths[row]) - 1, len(ids))
        differs = np.flatnonzero(self.rows.tokens[row, :cached] != np.asarray(ids[:cached], np.int32))
        return int(differs[0]) if len(differs) else cached

    def _prefill_once(self, decoder: CachedDecoder, todo: list[tuple[int, Sequence[int], int]]) -> list[Any]:
        """One chunk of the rows in `todo` that lack most, on each device of its own rows; returns what is left."""
        todo = sorted(todo, key=lambda lacking: lacking[2] - len(lacking[1]))
        longest, per_device = len(todo[0][1]) - 1 - todo[0][2], self.slots // self._ways
        lengths = self._prefill_shapes.lengths
        width = next((length for length in lengths if length >= longest), lengths[-1])
        most = max(Counter(row // per_device for row, _, _ in todo).values())
        sizes = self._prefill_sizes(width)
        size = next((size for size in sizes if size >= most), sizes[-1])
        chunk = rows, tokens, starts = self._chunk(size, width)
        used, left = [0] * self._ways, []
        for row, ids, start in todo:
            way, place = divmod(row, per_device)
            i, end = used[way], min(start + width, len(ids) - 1)
            if i == size:
                left.append((row, ids, start))
                continue
            rows[way, i], starts[way, i], tokens[way, i, : end - start] = place, start, ids[start:end]
            used[way] += 1
            self.num_prefilled += end - start
            if end < len(ids) - 1:
                left.append((row, ids, end))
        self._cache = self._prefill(decoder, self._cache, *device_put_batch(self.mesh, chunk))
        return left

    def _chunk(self, size: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `prefill` of this module takes behind the cache, of rows that there are not: nothing is written."""
        rows = np.tile(self.slots // self._ways + np.arange(size, dtype=np.int32), (self._ways, 1))
        return rows, np.zeros((*rows.shape, width), np.int32), np.zeros(rows.shape, np.int32)

    def _prefill_sizes(self, width: int) -> list[int]:
        """How many rows of each device a prefill call can have, ascending."""
        per_device = self.slots // self._ways
        return sorted({min(per_device, total // width) for total in self._prefill_shapes.totals})


class Window(NamedTuple):
    """The part of the cache that a decode call works on."""

    rows: int
    positions: int


def windows(cache: KVCache, mesh: Mesh, max_length: int) -> list[Window]:
    """Those that decode calls can be compiled for, the cheapest first; the last is the whole cache.

    All rows with as many positions as the longest needs, or fewer rows with many: those that are left in the end. Of a
    cache that is read in place all positions, and three quarters of the rows, too: what write while others search.
    Where rows are split over devices, all rows: fewer would have to move.
    """
    slots, is_in_place = cache.num_rows, cache.is_read_in_place
    shares = (1,) if is_in_place else SPAN_SHARES
    parts = {padded(-(-max_length // share)) for share in shares}
    spans = sorted(part for part in parts if part >= min(MIN_SPAN, padded(max_length)))
    few = {slots // share for share in ROW_SHARES} | ({slots * 3 // 4} if is_in_place else set())
    few = few - {0, slots} if batch_ways(mesh, slots) == 1 else set()
    found = [Window(slots, span) for span in spans] + [Window(rows, span) for rows in few for span in spans[-2:]]
    return sorted(found, key=lambda window: window.rows * (window.positions + MIN_SPAN))


def complete_all(
    engine: Engine,
    decoder: CachedDecoder,
    contexts: Sequence[Context],
    stops: StopTokens,
    *,
    chunk: int,
    leave_at: int,
) -> Iterator[tuple[int, list[int]]]:
    """Place and sampled ids of each context, as they come; a slot is refilled as soon as its row has ended.

    `chunk` and `leave_at` are those of `Engine.decode`.
    """
    engine.reset()
    waiting, busy = list(range(len(contexts)))[::-1], dict[int, int]()
    while waiting or busy:
        new = {}
        for slot in engine.find(RowStatus.EMPTY)[: len(waiting)]:
            busy[slot] = waiting.pop()
            new[slot] = contexts[busy[slot]]
        engine.set_context(decoder, new)
        engine.decode(decoder, chunk, leave_at, stops)
        for slot in engine.find(RowStatus.NEEDS_RETRIEVAL, RowStatus.DONE):
            place = busy.pop(slot)
            ids = engine.rows.tokens[slot, len(contexts[place].ids) : engine.rows.lengths[slot]].tolist()
            engine.release(slot)
            yield place, ids


def prefill(
    decoder: CachedDecoder, cache: KVCache, rows_WR: jax.Array, tokens_WRC: jax.Array, starts_WR: jax.Array
) -> KVCache:
    """Write keys and values of tokens_WRC at positions starts_WR + 0..C-1 of the given rows.

    The cache's rows are split over W devices, and rows_WR are counted from the first of each: so a device works on rows
    of its own. Rows beyond its last are dropped.
    """
    ways, _, length = tokens_WRC.shape
    is_row = rows_WR < cache.num_rows // ways
    starts_WR = jnp.where(is_row, starts_WR, jnp.max(starts_WR, where=is_row, initial=0))
    extent = Extent(jnp.min(starts_WR) + 1, jnp.max(starts_WR) + length)  # one for all: devices leave loops together
    if ways == 1:
        return decoder.extend(cache, tokens_WRC[0], starts_WR[0], rows_WR[0], extent)[0]
    apart = jax.tree.map(lambda x: x.reshape(ways, -1, *x.shape[1:]), cache)

    def extend(cache: KVCache, tokens_RC: jax.Array, starts_R: jax.Array, rows_R: jax.Array) -> KVCache:
        return decoder.extend(cache, tokens_RC, starts_R, rows_R, extent)[0]

    written = jax.vmap(extend)(apart, tokens_WRC, starts_WR, rows_WR)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), written)


def copy(cache: KVCache, sources_R: jax.Array, rows_R: jax.Array) -> KVCache:
    """Give rows the keys and values of others; rows >= B are dropped."""
    return cache.put(rows_R, cache.take(sources_R))


def decode(
    decoder: CachedDecoder,
    cache: KVCache,
    places: jax.Array,
    rows: Rows,
    max_tokens: jax.Array,
    leave_at: jax.Array,
    stops: jax.Array,
    pauses: jax.Array,
    truncation: Truncation,
    positions: int,
) -> DecodeState:
    """The bounded loop on the device: leaves after max_tokens, when no row is active, or when `leave_at` wait.

    Args:
        places: int32 [R], the rows of the cache to work on, ascending. rows: their control part.
        positions: what active rows can reach; what is beyond is neither read nor written.

    A part of the cache is taken out for the loop, and put back, unless it can be read where it is: then of active rows.
    """
    num_active = jnp.sum(rows.status == RowStatus.ACTIVE)
    is_in_place, some = cache.is_read_in_place, None if len(places) == cache.num_rows else places

    def is_going(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        number, state = carry
        active = jnp.sum(state.rows.status == RowStatus.ACTIVE)
        return (number < max_tokens) & (active > 0) & (num_active - active < leave_at)

    def body(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        number, state = carry
        rows = state.rows
        last = jnp.take_along_axis(rows.tokens, rows.lengths[:, None] - 1, axis=1)
        read = jnp.where(rows.status == RowStatus.ACTIVE, places, state.cache.num_rows) if is_in_place else None
        cache, hidden = decoder.extend(state.cache, last, rows.lengths - 1, read)
        token, logprob, logprob_t1 = sample(
            decoder.logits(hidden[:, 0]), rows, truncation, decoder.ops.target.can_branch
        )
        return number + 1, DecodeState(cache, append(rows, token, logprob, logprob_t1, stops, pauses))

    part = cache if is_in_place else cache.take(some, positions)
    state: DecodeState = jax.lax.while_loop(is_going, body, (jnp.int32(0), DecodeState(part, rows)))[1]
    return state if is_in_place else DecodeState(cache.put(some, state.cache), state.rows)


def sample(
    logits_BV: jax.Array, rows: Rows, truncation: Truncation, can_branch: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw a token per row; returns (token, log-probability as sampled, untruncated at temperature 1), [B].

    A greedy row (temperature 0) is scored at temperature 1, at which it is trained.
    """
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
    sampled_BV = truncate(logits_BV, temperature, truncation, can_branch=can_branch)
    largest_B = jnp.max(sampled_BV, axis=1)
    weights_BV = jax.lax.optimization_barrier(jnp.exp(sampled_BV - largest_B[:, None]))  # once for all who read them

    def draw(key: jax.Array, position: jax.Array, weights_V: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), position)
        return invert(weights_V, jax.random.uniform(key))

    drawn, total_B = jax.vmap(draw)(rows.keys, rows.lengths, weights_BV)
    token = jnp.where(rows.temperature > 0, drawn, jax.vmap(first_largest)(logits_BV))

    def of_token(x_BV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BV, token[:, None], axis=1)[:, 0]

    logprob = of_token(sampled_BV) - largest_B - jnp.log(total_B)
    logprob_t1 = of_token(logits_BV) - jax.nn.logsumexp(logits_BV, axis=1)
    return token.astype(jnp.int32), logprob, logprob_t1


def _blocks(x_V: jax.Array, fill: float) -> jax.Array:
    """[V] -> [blocks, VOCAB_BLOCK]."""
    num_blocks = -(-x_V.shape[0] // VOCAB_BLOCK)
    missing = num_blocks * VOCAB_BLOCK - x_V.shape[0]
    return jnp.pad(x_V, (0, missing), constant_values=fill).reshape(num_blocks, VOCAB_BLOCK)


def first_largest(x_V: jax.Array) -> jax.Array:
    """The argmax: of the blocks' maxima, then inside the block; over all at once a CPU takes ten times as long."""
    blocks = _blocks(x_V, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=1))
    return block * VOCAB_BLOCK + jnp.argmax(blocks[block])


def invert(weights_V: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The v with sum(weights[:v]) <= uniform * sum(weights) < sum(weights[:v + 1]), never one of weight 0; and the sum.

    Sums of blocks first, then inside the block: one random number and two short cumulative sums, where the Gumbel
    trick takes a random number and two logarithms for every token of the vocabulary.
    """
    blocks = _blocks(weights_V, 0.0)

    def first_above(sums: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.argmax(sums > jnp.clip(target, 0.0, jnp.nextafter(sums[-1], 0.0)))  # whatever was rounded

    sums = jnp.cumsum(jnp.sum(blocks, axis=1))
    target = uniform * sums[-1]
    block = first_above(sums, target)
    before = jnp.where(block > 0, sums[block - 1], 0.0)
    return block * VOCAB_BLOCK + first_above(jnp.cumsum(blocks[block]), target - before), sums[-1]


def append(
    rows: Rows, token: jax.Array, logprob: jax.Array, logprob_t1: jax.Array, stops: jax.Array, pauses: jax.Array
) -> Rows:
    """Write the sampled token of every active row behind its last one and update its status."""
    active = rows.status == RowStatus.ACTIVE
    at = jnp.where(active, rows.lengths, rows.tokens.shape[1])  # out of range: dropped
    budgets = rows.budgets - active
    status = jnp.where(jnp.isin(token, stops) | (budgets <= 0), RowStatus.DONE, RowStatus.ACTIVE)
    status = jnp.where(jnp.isin(token, pauses), RowStatus.NEEDS_RETRIEVAL, status)
    write = jax.vmap(lambda to, at, value: to.at[at].set(value, mode="drop"))  # each device its own rows
    return dataclasses.replace(
        rows,
        tokens=write(rows.tokens, at, token),
        logprobs=write(rows.logprobs, at, logprob),
        logprobs_t1=write(rows.logprobs_t1, at, logprob_t1),
        lengths=rows.lengths + active,
        budgets=budgets,
        status=jnp.where(active, status, rows.status).astype(jnp.int32),
    )

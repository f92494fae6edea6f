"""The sampler: slots with a KV cache, chunked prefill, bounded decode that pauses at retrieval calls.

The cache holds the keys and values of a row's tokens[: length - 1]; a decode step feeds the last token and samples the
next. So prefill computes no logits. `set_context` keeps the longest common prefix of a row's old and new ids: when
passages are appended to a paused row, only the passages are prefilled.

Recorded log-probabilities are those of the sampling distribution, after temperature and truncation. Training computes
log-probabilities under the same distribution.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.parallel.shardings import device_put_batch, device_put_global
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.distribution import WHOLE, Truncation
from r3rag_jax.sampler.ops import SamplerOps
from r3rag_jax.sampler.prefill_plan import Missing
from r3rag_jax.sampler.programs import shared_programs
from r3rag_jax.sampler.state import Rows, RowStatus
from r3rag_jax.sampler.stops import NO_STOPS, EndOf, StopTokens
from r3rag_jax.types import Context


class SamplerWork(NamedTuple):
    """Counts of an engine."""

    prefilled: int  # tokens
    sampled: int  # tokens
    steps: int  # of decoding, in each of which all active rows sample a token
    attended: int  # cached positions that sampled tokens attended to
    bytes_read: float  # from a device's memory while decoding: its weights in each step, and the attended positions


class Engine:
    """Generates tokens in a fixed number of slots. It holds no weights: callers pass a loaded decoder to each call."""

    def __init__(
        self,
        graphdef: Any,
        config: DecoderConfig,
        mesh: Mesh,
        *,
        slots: int,
        max_length: int,
        decode_chunk: int = 32,
        truncation: Truncation = WHOLE,
        dtype: Any = jnp.float32,
        shard_weights: bool = False,
        ops: SamplerOps | None = None,
    ):
        """Allocate the cache and jit the engine's programs.

        Args:
            graphdef: static half of the `Decoder` whose parameters `load` takes.
            slots: number of rows.
            max_length: tokens per row, context included.
            decode_chunk: maximum tokens per row in one device call.
            truncation: tokens that are excluded from sampling.
            dtype: of the cached keys and values.
            shard_weights: `split` of `CachedDecoder.shardings`.
            ops: None: the fastest operations for the mesh's devices.
        """
        self.programs = shared_programs(
            config, mesh, slots=slots, max_length=max_length, decode_chunk=decode_chunk, truncation=truncation,
            dtype=dtype, shard_weights=shard_weights, ops=ops,
        )  # fmt: skip
        self.mesh, self.slots, self.max_length = mesh, slots, max_length
        self.rows = Rows.empty(slots, max_length)
        self._decode_chunk = decode_chunk
        self._starts = np.zeros(slots, np.int32)  # length of each row's context
        self._cache = self.programs.init_cache()
        self._load = self.programs.load(graphdef)
        self._needs_warm_up = not self.programs.ops.target.is_cpu
        self.num_prefilled = 0  # tokens, without padding
        self.num_sampled = 0
        self.num_steps = 0  # of decoding, in each of which all active rows sample a token
        self.num_attended = 0  # cached positions that sampled tokens attended to
        self._weight_bytes = 0.0  # of the policy on a device
        self._bytes_read = 0.0

    def load(self, params: Any) -> CachedDecoder:
        """Copy parameters (a state of `graphdef`) to the layout of the engine; `params` may be donated afterwards.

        On an accelerator the first call also compiles every program of the engine, see `warm_up`.
        """
        decoder = self._load(params)
        self._weight_bytes = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(decoder))
        if self._needs_warm_up:
            self.warm_up(decoder)
        return decoder

    def warm_up(self, decoder: CachedDecoder) -> None:
        """Compile every program of the engine in parallel threads: at most 19, or 15 on an accelerator.

        `load` does it on an accelerator; again, it costs nothing.
        """
        programs = self.programs.all(decoder)
        with ThreadPoolExecutor(len(programs)) as pool:
            # Later calls of the jitted functions hit jit's cache.
            list(pool.map(lambda program: program.lower().compile(), programs))
        self._needs_warm_up = False

    def reset(self) -> None:
        """Empty all rows. Call it whenever the parameters change: the cached keys and values are stale then."""
        self.rows = Rows.empty(self.slots, self.max_length)

    def set_context(self, decoder: CachedDecoder, contexts: Mapping[int, Context]) -> None:
        """Set the contexts of rows (row -> context) and make them ACTIVE; tokens that are already cached are kept.

        If several rows get the same context, as the samples of one question do, one of them is prefilled on every
        device that has such rows, and its keys and values are copied to the others there. Devices prefill at the same
        time, so one that waited for another's keys and values would gain nothing.

        Raises:
            ValueError: a context is empty or leaves no space for a token.
        """
        missing: list[Missing] = []
        plan = self.programs.plan
        first: dict[tuple[int, tuple[int, ...]], int] = {}  # device, context -> the row that is prefilled with it
        copies: list[tuple[int, int]] = []  # from, to
        for row, context in contexts.items():
            length = len(context.ids)
            if not 1 <= length < self.max_length:
                raise ValueError(f"a context must hold 1 to {self.max_length - 1} tokens; got {length}")
            kept = self._common_prefix(row, context.ids)
            if kept < length - 1:
                source = first.setdefault((plan.device_of(row), tuple(context.ids)), row)
                if source == row:
                    missing.append(Missing(row, context.ids, kept))
                else:
                    copies.append((source, row))
            self._start(row, context)
        while missing:
            chunk, missing, num_tokens = plan.next_chunk(missing)
            self._cache = self.programs.prefill(decoder, self._cache, *device_put_batch(self.mesh, tuple(chunk)))
            self.num_prefilled += num_tokens
        if copies:
            arrays = device_put_batch(self.mesh, plan.copies(copies))
            self._cache = self.programs.copy(self._cache, *arrays)

    def decode(self, decoder: CachedDecoder, max_tokens: int, leave_at: int, stops: StopTokens = NO_STOPS) -> None:
        """Sample up to `max_tokens` per active row; returns early once `leave_at` rows have paused or ended."""
        active = self.find(RowStatus.ACTIVE)
        before, num_active = self.rows.lengths.copy(), len(active)
        while active and max_tokens > 0 and num_active - len(active) < leave_at:
            count = min(max_tokens, self._decode_chunk)
            self._decode_once(decoder, active, count, leave_at - (num_active - len(active)), stops)
            max_tokens, active = max_tokens - count, self.find(RowStatus.ACTIVE)
        self.num_sampled += int((self.rows.lengths - before).sum())

    def wait(self) -> None:
        """Wait until the cache holds what was prefilled."""
        jax.block_until_ready(self._cache)

    @property
    def work(self) -> SamplerWork:
        """What was done so far."""
        return SamplerWork(
            self.num_prefilled, self.num_sampled, self.num_steps, self.num_attended, self._bytes_read
        )  # fmt: skip

    def release(self, row: int) -> None:
        """Mark a slot as EMPTY. Its cache is kept and reused if the next context has a common prefix."""
        self.rows.status[row] = RowStatus.EMPTY

    def forget(self, row: int) -> None:
        """Reuse nothing of the row's cache: its next context is for other parameters."""
        self.rows.lengths[row] = 1

    @contextlib.contextmanager
    def holding(self, rows: Collection[int]) -> Iterator[None]:
        """Leave active rows out of the decode calls in the `with` block, which are for other parameters than theirs.

        A call may overwrite the keys and values of a held row's last token, which its next own call computes first.
        """
        held = list(rows)
        self.rows.status[held] = RowStatus.HELD
        try:
            yield
        finally:
            self.rows.status[held] = RowStatus.ACTIVE

    def find(self, *status: RowStatus) -> list[int]:
        """Indices of the rows with one of these statuses, ascending."""
        return np.flatnonzero(np.isin(self.rows.status, status)).tolist()

    def _start(self, row: int, context: Context) -> None:
        """Set the host-side state of a row from a context."""
        rows, length = self.rows, len(context.ids)
        rows.tokens[row, :length] = context.ids
        rows.lengths[row] = self._starts[row] = length
        rows.status[row] = RowStatus.ACTIVE
        rows.budgets[row] = min(context.budget, self.max_length - length)
        rows.temperature[row] = context.temperature
        rows.keys[row] = 0 if context.key is None else context.key

    def _common_prefix(self, row: int, ids: Sequence[int]) -> int:
        """The number of leading `ids` whose keys and values are in the row's cache."""
        cached = min(int(self.rows.lengths[row]) - 1, len(ids))
        differs = np.flatnonzero(self.rows.tokens[row, :cached] != np.asarray(ids[:cached], np.int32))
        return int(differs[0]) if len(differs) else cached

    def _decode_once(
        self, decoder: CachedDecoder, active: Sequence[int], max_tokens: int, leave_at: int, stops: StopTokens
    ) -> None:
        """Run one device call in the cheapest window for the active rows, filled up with inactive rows."""
        reach = int(np.max(self.rows.lengths[active] + np.minimum(max_tokens, self.rows.budgets[active])))
        window = next(w for w in self.programs.windows if w.rows >= len(active) and w.positions >= reach)
        others = np.setdiff1d(np.arange(self.slots), active)[: window.rows - len(active)]
        rows = np.union1d(active, others).astype(np.int32)
        args, before = self._decode_args(rows, max_tokens, leave_at, stops), self.rows.lengths[active]
        state = self.programs.decode(decoder, self._cache, *args, positions=window.positions)
        self._cache = state.cache
        self.rows.update(rows, jax.device_get(state.rows))
        after = self.rows.lengths[active].astype(int)
        self._count(int((after - before).max()), int(((after - before) * (after + before - 1) // 2).sum()))
        if stops.end_of is not None:
            self._stop_at_strings(active, stops.end_of)

    def _count(self, num_steps: int, num_attended: int) -> None:
        """Add a decode call to the engine's work."""
        self.num_steps += num_steps
        self.num_attended += num_attended
        of_position = sum(x.nbytes for x in jax.tree.leaves(self._cache)) / (self.slots * self.max_length)
        self._bytes_read += num_steps * self._weight_bytes + num_attended * of_position / self.mesh.size

    def _decode_args(self, rows: np.ndarray, max_tokens: int, leave_at: int, stops: StopTokens) -> tuple[Any, ...]:
        """The arguments of `decode.decode` from `cache_rows` to `pause_ids`."""
        control = device_put_global(self.rows.decode_rows(rows, self._decode_chunk), self.programs.rows_shardings)
        return rows, control, np.int32(max_tokens), np.int32(leave_at), stops.all_ids, stops.padded_pause_ids

    def _stop_at_strings(self, rows: Sequence[int], end_of: EndOf) -> None:
        """End the rows whose sampled text contains a stop string, and drop the tokens after it."""
        for row in rows:
            start, end = int(self._starts[row]), int(self.rows.lengths[row])
            if num_kept := end_of(self.rows.tokens[row, start:end].tolist()):
                if start + num_kept < end or self.rows.status[row] == RowStatus.ACTIVE:
                    self.rows.status[row] = RowStatus.DONE
                self.rows.lengths[row] = start + num_kept


def complete_all(
    engine: Engine,
    decoder: CachedDecoder,
    contexts: Sequence[Context],
    stops: StopTokens,
    *,
    chunk: int,
    leave_at: int,
) -> Iterator[tuple[int, list[int]]]:
    """Complete all contexts; yields (context index, sampled ids) in the order in which rows end or pause.

    A finished row's slot is refilled with the next context.

    Args:
        chunk: `max_tokens` of each `Engine.decode` call.
        leave_at: see `Engine.decode`.
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
            index = busy.pop(slot)
            ids = engine.rows.tokens[slot, len(contexts[index].ids) : engine.rows.lengths[slot]].tolist()
            engine.release(slot)
            yield index, ids

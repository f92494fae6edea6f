"""Completions for questions that come and go: what the live scheduler samples with.

Unlike a rollout's `Generation`, a sampler has several policies, tells what has been written of a completion before it
ends, and drops one on request. One that fails concerns its own question alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Protocol

from r3rag_jax.clients.completions import CompletionsClient
from r3rag_jax.rollout.env import StopRule
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.sampler.state import RowStatus
from r3rag_jax.sampler.stops import StopTokens
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion, Context

CHUNK = 4  # most tokens per row in a decode call, after which they are shown and new questions begin


@dataclasses.dataclass(eq=False)
class Draft:
    """A completion under way."""

    slot: int
    policy: str
    context: Context
    is_cancelled: bool = False


News = list[int] | Completion | Exception  # the ids so far, all of them, or why there will be none
Tell = Callable[[Draft, News], None]  # may be called from any thread


class LiveSampler(Protocol):
    """Samples drafts, of which each slot has one at a time. All but `tell` is called from one thread."""

    @property
    def num_slots(self) -> int:
        """Number of drafts that can be under way."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether `work` has something to do."""
        ...

    def start(self, tell: Tell) -> None:
        """Called once, before anything else."""
        ...

    def begin(self, draft: Draft) -> None:
        """Sample a draft; its slot has no other."""
        ...

    def cancel(self, draft: Draft) -> None:
        """Drop a draft; its slot is free."""
        ...

    def work(self) -> None:
        """Sample for a moment."""
        ...

    def close(self) -> None:
        """Drop what is under way."""
        ...


class EngineSampler:
    """Samples in the rows of one engine; the rows of different policies are decoded in turns."""

    def __init__(self, engine: Engine, policies: Mapping[str, CachedDecoder], tokenizer: Tokenizer, stops: StopRule):
        """`policies`: by name, parameters as `Engine.load` returned them."""
        self._engine, self._policies = engine, dict(policies)
        end_of = functools.partial(tokenizer.end_of, stops.stop_strings) if stops.stop_strings else None
        self._stops = StopTokens(stops.pause_ids, stops.stop_ids, end_of)
        self._drafts: dict[int, Draft] = {}  # slot, which is the row -> its draft
        self._new: list[Draft] = []  # of these, those whose context is not set
        self._cached_for: dict[int, str] = {}  # row -> policy of its keys and values
        self._tell: Tell = lambda draft, news: None
        engine.reset()

    @property
    def num_slots(self) -> int:
        """See `LiveSampler.num_slots`."""
        return self._engine.slots

    @property
    def has_work(self) -> bool:
        """See `LiveSampler.has_work`."""
        return bool(self._drafts)

    def start(self, tell: Tell) -> None:
        """See `LiveSampler.start`."""
        self._tell = tell

    def begin(self, draft: Draft) -> None:
        """See `LiveSampler.begin`."""
        if self._cached_for.get(draft.slot) != draft.policy:
            self._engine.forget(draft.slot)
            self._cached_for[draft.slot] = draft.policy
        self._drafts[draft.slot] = draft
        self._new.append(draft)

    def cancel(self, draft: Draft) -> None:
        """See `LiveSampler.cancel`."""
        if self._drafts.get(draft.slot) is draft:  # else it is complete, which has been told
            self._engine.release(draft.slot)
            del self._drafts[draft.slot]
            self._new = [new for new in self._new if new is not draft]

    def work(self) -> None:
        """See `LiveSampler.work`: prefills new contexts, and makes a short decode call for each policy."""
        engine, rows = self._engine, self._engine.rows
        for name, decoder in self._policies.items():
            engine.set_context(decoder, {draft.slot: draft.context for draft in self._new if draft.policy == name})
        self._new = []
        for name, decoder in self._policies.items():
            active = engine.find(RowStatus.ACTIVE)
            others = [row for row in active if self._drafts[row].policy != name]
            if len(others) < len(active):
                with engine.holding(others):
                    engine.decode(decoder, CHUNK, 1, self._stops)
        for slot, draft in list(self._drafts.items()):
            sampled = slice(len(draft.context.ids), int(rows.lengths[slot]))
            ids = rows.tokens[slot, sampled].tolist()
            if rows.status[slot] == RowStatus.ACTIVE:
                self._tell(draft, ids)
            else:
                engine.release(slot)
                del self._drafts[slot]
                self._tell(draft, Completion(ids, rows.logprobs[slot, sampled].copy()))

    def close(self) -> None:
        """See `LiveSampler.close`."""
        for draft in list(self._drafts.values()):
            self.cancel(draft)


class _Dropped(Exception):
    """Nobody waits for the completion any more."""


class ServerSampler:
    """An inference server, which has one policy whatever its name here, and streams what it writes."""

    has_work = False

    def __init__(self, client: CompletionsClient, num_slots: int):
        """`num_slots`: most requests in flight; a cancelled one is one of them until more of it comes."""
        self.num_slots = num_slots
        self._client, self._pool, self._session = client, ThreadPoolExecutor(num_slots), ExitStack()
        self._tell: Tell = lambda draft, news: None

    def start(self, tell: Tell) -> None:
        """See `LiveSampler.start`."""
        self._tell = tell
        self._session.enter_context(self._client.session())

    def begin(self, draft: Draft) -> None:
        """See `LiveSampler.begin`."""
        self._pool.submit(self._complete, draft)

    def _complete(self, draft: Draft) -> None:
        def written(ids: list[int]) -> None:
            if draft.is_cancelled:
                raise _Dropped  # the server notices that its client has left
            self._tell(draft, ids)

        if draft.is_cancelled:
            return
        try:
            self._tell(draft, self._client.complete(draft.context, written))
        except _Dropped:
            return
        except Exception as error:  # a UserError, or a fault, concerns this question
            self._tell(draft, error)

    def cancel(self, draft: Draft) -> None:
        """See `LiveSampler.cancel`."""
        draft.is_cancelled = True

    def work(self) -> None:
        """See `LiveSampler.work`: the server works."""

    def close(self) -> None:
        """See `LiveSampler.close`. Requests in flight are not retried, and not waited for."""
        self._client.give_up()
        self._session.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

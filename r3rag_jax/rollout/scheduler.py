"""The rollout loop: slots, the queue of requests, and searches, for every Env and every backend.

    queue ─► slots ─► sample ─► Env.step ─┬─ Search ──► retrieve ─► Env.observe ─┐
               ▲        ▲                 └─ Done ─► the slot is free            │
               │        └────────────────────────── Context ─────────────────────┤
               └──────────────────────────────────── Done ───────────────────────┘
A slot is refilled as soon as its question is finished, so slow questions do not hold up the others.

With `search_overlap` above 0 a search runs in a thread while that many calls sample the other slots. When it is awaited
is counted in calls (`Generation.wait`), never by the clock: however slow the retriever, the engine is called in the
same order with the same arguments, on every process of a pod.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from r3rag_jax.retrieval.base import Hit, Retriever
from r3rag_jax.rollout.backends import Generation, RolloutBackend
from r3rag_jax.rollout.env import Done, EnvFactory, Search, Transition
from r3rag_jax.rollout.play import Play
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.times import RolloutTimes
from r3rag_jax.run.watchdog import moved
from r3rag_jax.types import Context, Trajectory

OnDone = Callable[[Trajectory], None]


def rollout(
    backend: RolloutBackend,
    env_factory: EnvFactory,
    retriever: Retriever,
    requests: Sequence[RolloutRequest],
    *,
    search_overlap: int = 0,
    on_done: OnDone | None = None,
    times: RolloutTimes | None = None,
) -> list[Trajectory]:
    """Return the trajectories of the requests, in their order, with the numbers of tokens that they read and wrote.

    Args:
        search_overlap: calls that sample other slots while a search runs; 0: sampling waits for searches.
        on_done: called with each trajectory when it has ended.
        times: to which the seconds of prefill, decode and searches are added.

    Raises:
        RetrievalError: a search failed; it is never taken for "nothing found".
        UserError: the backend failed. Completions under way are awaited first, and `on_done` is called with the
            trajectories that they end.
    """
    with ThreadPoolExecutor(max(1, search_overlap)) as pool, backend.generate(env_factory.stops) as generation:
        scheduler = _Scheduler(
            generation, backend.num_slots, env_factory, retriever, pool, search_overlap, on_done,
            times or RolloutTimes(),
        )  # fmt: skip
        return scheduler.run(requests)


@dataclasses.dataclass(frozen=True)
class _RunningSearch:
    """One batched search that may be under way."""

    last_call: int  # the last call during which it may run
    slots: list[int]
    hits: Callable[[], list[list[Hit]]]  # waits for the result; hits of each slot


class _Scheduler:
    """The state of one call of `rollout`."""

    def __init__(
        self,
        generation: Generation,
        num_slots: int,
        env_factory: EnvFactory,
        retriever: Retriever,
        pool: ThreadPoolExecutor,
        search_overlap: int,
        on_done: OnDone | None,
        times: RolloutTimes,
    ):
        self._generation, self._num_slots, self._env_factory = generation, num_slots, env_factory
        self._retriever, self._pool, self._search_overlap = retriever, pool, search_overlap
        self._on_done, self._times = on_done, times
        self._queue: deque[tuple[int, RolloutRequest]] = deque()  # requests without a slot, with their index
        self._indices: dict[int, int] = {}  # slot -> index of its request
        self._plays: dict[int, Play] = {}  # slot -> its question
        self._contexts: dict[int, Context] = {}  # slot -> context to be submitted
        self._queries: dict[int, Search] = {}  # slot -> search to be started
        self._searches: deque[_RunningSearch] = deque()
        self._done: dict[int, Trajectory] = {}  # index of the request -> trajectory

    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        self._queue.extend(enumerate(requests))
        for call in itertools.count():
            moved(f"rollouts: call {call}, {len(self._done)} of {len(requests)} done")
            self._finish_searches(before=call)
            self._fill_slots()
            self._start_search(call - 1)  # of questions that begin with one
            self._finish_searches(before=call)
            if not self._plays and not self._queue:
                break
            while self._searches and not self._contexts and not self._generation.num_active:
                self._finish_search()  # no call could run during the search
            contexts, self._contexts = self._contexts, {}
            with self._times.watch.measure("prefill"):
                self._generation.submit(contexts)
            for slot, context in contexts.items():
                self._plays[slot].submitted(context)
            with self._times.watch.measure("decode"):
                completions = self._generation.wait()
            for slot, completion in completions:
                self._advance(slot, self._plays[slot].step(completion))
            self._start_search(call)
        return [self._done[index] for index in range(len(requests))]

    def _fill_slots(self) -> None:
        """Give free slots the next requests, unless the backend has failed."""
        free = (slot for slot in range(self._num_slots) if slot not in self._plays)
        for slot in itertools.islice(free, len(self._queue) if self._generation.is_open else 0):
            self._indices[slot], request = self._queue.popleft()
            play = self._plays[slot] = Play(self._env_factory(request))
            self._advance(slot, play.start())

    def _advance(self, slot: int, transition: Transition) -> None:
        """Note what is to happen next in a slot."""
        if isinstance(transition, Context):
            self._contexts[slot] = transition
        elif isinstance(transition, Search):
            self._queries[slot] = transition
        else:
            self._finish(slot, transition)

    def _finish(self, slot: int, done: Done) -> None:
        trajectory = self._done[self._indices.pop(slot)] = self._plays.pop(slot).trajectory(done)
        if self._on_done is not None:
            self._on_done(trajectory)

    def _start_search(self, call: int) -> None:
        """Start one batched search, as deep as the deepest query needs, for all slots that `call` left without hits.

        Without overlap it is carried out when its hits are asked for.
        """
        if not self._queries:
            return
        queries, self._queries = self._queries, {}
        depth = max(query.k for query in queries.values())
        texts = [query.query for query in queries.values()]
        search = functools.partial(self._times.search, self._retriever, texts, depth)
        hits = search if self._search_overlap == 0 else self._pool.submit(search).result
        self._searches.append(_RunningSearch(call + self._search_overlap, list(queries), hits))

    def _finish_searches(self, before: int) -> None:
        """Finish the searches that may not run during call `before`."""
        while self._searches and self._searches[0].last_call < before:
            self._finish_search()

    def _finish_search(self) -> None:
        """Wait for the oldest search, and go on with its slots."""
        search = self._searches.popleft()
        with self._times.watch.measure("search_wait"):
            found = search.hits()
        for slot, hits in zip(search.slots, found, strict=True):
            self._advance(slot, self._plays[slot].observe(hits))

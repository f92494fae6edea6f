"""Rollouts: sampler and retriever take turns until every trajectory has ended.

    queue ─► slots ─► decode ─► parse ─┬─ query ──► retrieve, splice, set_context ─┐
               ▲                       └─ answer, malformed, out of steps ─► done  │
               └───────────────────────────────────────────────────────────────────┘
A slot is refilled as soon as its row ends, so slow questions do not hold up the others. What a step means is the same
whoever samples it: `Roller` plays with the engine of this package, `ServedRoller` with a user's inference server.

With `rollout.search_overlap` above 0 a search runs in a thread beside so many decode calls of the other rows. When it
is awaited is counted in calls, never by the clock: however slow the retriever, the same calls are made with the same
numbers in them, on every process of a pod.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np

from r3rag_jax.clients.completions import Completion, Server
from r3rag_jax.config import RolloutConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Hit, Retriever
from r3rag_jax.retrieval.selection import select_passages
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.sampler.state import RowStatus
from r3rag_jax.text.transcript import Codec, Transcript
from r3rag_jax.types import Context, Question, Status, Step, Trajectory

LEAVE_SHARE = 2  # a decode call leaves when one of so many rows waits: rows wait less, or calls are fewer
OnDone = Callable[[Trajectory], None]
Hits = Callable[[], list[list[Hit]]]  # of a search that may be under way


@dataclasses.dataclass(frozen=True)
class Job:
    """One trajectory to sample: its randomness depends on (seed, sample_index, question), not on its slot."""

    question: Question
    sample_index: int = 0
    temperature: float = 0.0
    seed: int = 0

    def key(self, step: int) -> np.ndarray:
        """uint32 [2], the PRNG key of the row while it writes its step (from 0)."""
        entropy = [self.seed, self.sample_index, step, *self.question.id.encode()]
        return np.random.SeedSequence(entropy).generate_state(2)


class _Row:
    """A trajectory under way."""

    def __init__(self, job: Job, codec: Codec):
        self.job = job
        self.transcript = Transcript(codec, job.question.question)
        self.steps: list[Step] = []
        self.seen: set[str] = set()
        self.num_sampled = 0  # tokens, over all steps
        self.was_cut_off = False  # the last step, by a budget

    def finish(self, status: Status) -> Trajectory:
        samples = self.transcript.samples(self.job.temperature)
        return Trajectory(self.job.question, tuple(self.steps), status, samples, self.job.sample_index)


class Player(Protocol):
    """Whatever plays jobs."""

    def play(self, policy: Any, jobs: Sequence[Job], on_done: OnDone | None = None) -> list[Trajectory]:
        """Trajectories of the jobs, in their order. `on_done` hears of each as it ends.

        Raises:
            RetrievalError: a search failed; it is never taken for "nothing found".
        """
        ...


@dataclasses.dataclass(frozen=True)
class Rules:
    """What every backend shares: what a row is to continue, what a step means, what its passages are."""

    codec: Codec
    retriever: Retriever
    config: RolloutConfig
    top_k: int
    max_passages: int

    def context(self, row: _Row) -> Context:
        """What the row is to continue. A prompt that does not fit the context at all is an error of the setting."""
        budget = min(self.config.max_new_tokens, self._num_left(row))
        return Context(row.transcript.context, budget, row.job.temperature, row.job.key(len(row.steps)))

    def read(self, row: _Row, ids: Sequence[int], logprobs: np.ndarray) -> None:
        """Append the step that was sampled behind the row's context."""
        row.transcript.write(ids, logprobs)
        step = self.codec.parse_step(ids, len(row.steps) + 1)
        row.num_sampled += len(ids)
        row.was_cut_off = ids[-1] not in {self.codec.eos_id, *self.codec.stop_ids} and self.end_of(ids) == 0
        if row.was_cut_off:
            step = Step(step.analysis, step.query, step.answer, is_well_formed=False)
        row.steps.append(step)

    def end_of(self, ids: Sequence[int]) -> int:
        """Where the first stop string ends, or 0; see `Engine.stop_at`."""
        strings = self.config.stop_strings
        return self.codec.tokenizer.end_of(strings, ids) if strings else 0

    def end(self, row: _Row) -> Trajectory | None:
        """The trajectory, where the step just read ends it; None where it asks."""
        step = row.steps[-1]
        if row.was_cut_off and self._num_left(row) == 0:
            return row.finish(Status.NO_ANSWER)
        if not step.is_well_formed:
            return row.finish(Status.FORMAT_ERROR)
        return None if step.answer is None else row.finish(Status.ANSWERED)

    def search(self, rows: Sequence[_Row]) -> list[list[Hit]]:
        """One batched search for the rows' queries; deep enough for `tell`."""
        depth = self.top_k + max(len(row.seen) for row in rows)
        return self.retriever.search([row.steps[-1].query or "" for row in rows], depth)

    def tell(self, row: _Row, hits: Sequence[Hit]) -> Trajectory | None:
        """Append the passages; those seen before make room for deeper hits. The trajectory, where no budget is left."""
        passages = select_passages(hits, row.seen, self.top_k, max_passages=self.max_passages)
        row.seen |= {passage.id for passage in passages}
        row.steps[-1] = dataclasses.replace(row.steps[-1], passages=passages)
        row.transcript.splice(passages)
        has_room = len(row.transcript.context) < self.config.max_length - 1
        if len(row.steps) < self.config.max_steps and has_room and self._num_left(row) > 0:
            return None
        return row.finish(Status.NO_ANSWER)

    def _num_left(self, row: _Row) -> int:
        """Tokens that the trajectory may still sample."""
        limit = self.config.max_trajectory_tokens
        return limit - row.num_sampled if limit else self.config.max_length * self.config.max_steps


class _Game:
    """Jobs under way: which wait, which have a place to be written at, what has come of the others."""

    def __init__(self, rules: Rules, jobs: Sequence[Job], on_done: OnDone | None):
        self._rules, self._on_done = rules, on_done
        self._queue = deque(enumerate(jobs))
        self._numbers: dict[int, int] = {}  # place -> number of its job
        self.rows: dict[int, _Row] = {}  # place -> row
        self._done: dict[int, Trajectory] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def start(self, place: int) -> Context:
        """Give a place the next job that waits."""
        self._numbers[place], job = self._queue.popleft()
        self.rows[place] = _Row(job, self._rules.codec)
        return self._rules.context(self.rows[place])

    def end(self, place: int, trajectory: Trajectory | None) -> bool:
        """Whether the place is free: it is where there is a trajectory."""
        if trajectory is None:
            return False
        del self.rows[place]
        self._done[self._numbers.pop(place)] = trajectory
        if self._on_done is not None:
            self._on_done(trajectory)
        return True

    def trajectories(self) -> list[Trajectory]:
        """In the order of the jobs, all of which have ended."""
        return [self._done[number] for number in range(len(self._done))]


class Roller:
    """Plays jobs with one engine."""

    def __init__(self, engine: Engine, rules: Rules):
        self.engine, self.rules = engine, rules

    def play(self, policy: Any, jobs: Sequence[Job], on_done: OnDone | None = None) -> list[Trajectory]:
        """See `Player`; `policy` is what the engine loaded."""
        self.engine.reset()
        game, config = _Game(self.rules, jobs, on_done), self.rules.config
        searches: deque[tuple[int, list[int], Hits]] = deque()  # the last turn it runs beside, slots, hits of each
        with ThreadPoolExecutor(max(1, config.search_overlap)) as pool:
            for turn in itertools.count():
                contexts: dict[int, Context] = {}  # one call for all that is to be prefilled
                while searches and searches[0][0] < turn:
                    contexts |= self._tell(game, *searches.popleft()[1:])
                for slot in self.engine.find(RowStatus.EMPTY)[: game.num_waiting]:
                    contexts[slot] = game.start(slot)
                if not game.rows:
                    return game.trajectories()
                while searches and not contexts and not self.engine.find(RowStatus.ACTIVE):
                    contexts = self._tell(game, *searches.popleft()[1:])
                self.engine.set_context(policy, contexts)
                if active := self.engine.find(RowStatus.ACTIVE):
                    self.engine.decode(policy, config.decode_chunk, leave_at=max(1, len(active) // LEAVE_SHARE))
                if asking := self._read(game):
                    hits = self._search(pool, [game.rows[slot] for slot in asking])
                    searches.append((turn + config.search_overlap, asking, hits))
        raise AssertionError("the loop ends by returning")

    def _read(self, game: _Game) -> list[int]:
        """Read what has been written to its end; returns the slots that ask."""
        asking = []
        for slot in self.engine.find(RowStatus.NEEDS_RETRIEVAL, RowStatus.DONE):
            row, rows = game.rows[slot], self.engine.rows
            written = slice(len(row.transcript.context), int(rows.lengths[slot]))
            self.rules.read(row, rows.tokens[slot, written].tolist(), rows.logprobs[slot, written].copy())
            if game.end(slot, self.rules.end(row)):
                self.engine.release(slot)
            else:
                self.engine.hold(slot)
                asking.append(slot)
        return asking

    def _search(self, pool: ThreadPoolExecutor, rows: Sequence[_Row]) -> Hits:
        """Start a search: here, when its hits are asked for, where none is to run beside anything."""
        if self.rules.config.search_overlap == 0:
            return functools.partial(self.rules.search, rows)
        return pool.submit(self.rules.search, rows).result

    def _tell(self, game: _Game, slots: Sequence[int], hits: Hits) -> dict[int, Context]:
        """What the slots go on with behind their passages; the others have ended."""
        contexts = {}
        for slot, found in zip(slots, hits(), strict=True):
            row = game.rows[slot]
            if game.end(slot, self.rules.tell(row, found)):
                self.engine.release(slot)
            else:
                contexts[slot] = self.rules.context(row)
        return contexts


class ServedRoller:
    """Plays jobs with a user's inference server, `server.max_in_flight` requests at once; see `clients.completions`."""

    def __init__(self, server: Server, rules: Rules):
        self.server, self.rules = server, rules

    def play(self, policy: Any, jobs: Sequence[Job], on_done: OnDone | None = None) -> list[Trajectory]:
        """See `Player`; `policy` is not used, the server has its own.

        Raises:
            UserError: the server failed. Requests in flight are awaited first, and `on_done` hears of what they end.
        """
        game, slots = _Game(self.rules, jobs, on_done), self.server.max_in_flight
        busy: dict[Future[Completion], int] = {}  # a request in flight -> its place
        places, failure = itertools.count(), None
        with ThreadPoolExecutor(slots) as pool, self.server.session():
            while busy or (game.num_waiting and failure is None):
                while game.num_waiting and failure is None and len(busy) < slots:
                    place = next(places)
                    busy[pool.submit(self.server.complete, game.start(place))] = place
                asking = []
                for future in sorted(wait(busy, return_when=FIRST_COMPLETED).done, key=busy.__getitem__):
                    place = busy.pop(future)
                    try:
                        completion = future.result()
                    except UserError as error:
                        failure = failure or error
                        self.server.give_up()
                        continue
                    row = game.rows[place]
                    self.rules.read(row, completion.ids, completion.behaviour_logprobs)
                    if not game.end(place, self.rules.end(row)):
                        asking.append(place)
                hits = self.rules.search([game.rows[place] for place in asking]) if asking else []
                for place, found in zip(asking, hits, strict=True):
                    row = game.rows[place]
                    if not game.end(place, self.rules.tell(row, found)) and failure is None:
                        busy[pool.submit(self.server.complete, self.rules.context(row))] = place
        if failure is not None:
            raise failure
        return game.trajectories()

"""Rollouts: sampler and retriever take turns until every trajectory has ended.

    queue ─► slots ─► decode ─► parse ─┬─ query ──► retrieve, splice, set_context ─┐
               ▲                       └─ answer, malformed, out of steps ─► done  │
               └───────────────────────────────────────────────────────────────────┘
A slot is refilled as soon as its row ends, so slow questions do not hold up the others. What a step means is the same
whoever samples it: `Roller` plays with the engine of this package, `ServedRoller` with a user's inference server.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

import numpy as np

from r3rag_jax.config import RolloutConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.retrieval.passages import select_passages
from r3rag_jax.sampler.engine import Context, Engine
from r3rag_jax.sampler.server import Completion, Server
from r3rag_jax.sampler.state import RowStatus
from r3rag_jax.transcript import Codec, Transcript
from r3rag_jax.types import Question, Status, Step, Trajectory

OnDone = Callable[[Trajectory], None]
Place = TypeVar("Place")  # what a backend calls a row by: its slot, or its place among the jobs


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

    def play(self, params: Any, jobs: Sequence[Job], on_done: OnDone | None = None) -> list[Trajectory]:
        """Trajectories of the jobs, in their order. `on_done` hears of each as it ends.

        Raises:
            RetrievalError: a search failed; it is never taken for "nothing found".
        """
        ...


class _Loop:
    """What every backend shares: reading a step, retrieving for it, ending a trajectory."""

    def __init__(
        self, codec: Codec, retriever: Retriever, config: RolloutConfig, max_length: int, top_k: int, max_passages: int
    ):
        self.codec, self.retriever, self.config, self.max_length = codec, retriever, config, max_length
        self.top_k, self.max_passages = top_k, max_passages

    def _context(self, row: _Row) -> Context:
        """What the row is to continue. A prompt that does not fit the context at all is an error of the setting."""
        budget = min(self.config.max_new_tokens, self._num_left(row))
        return Context(row.transcript.context, budget, row.job.temperature, row.job.key(len(row.steps)))

    def _num_left(self, row: _Row) -> int:
        """Tokens that the trajectory may still sample."""
        limit = self.config.max_trajectory_tokens
        return limit - row.num_sampled if limit else self.max_length * self.config.max_steps

    def _read(self, row: _Row, ids: Sequence[int], logprobs: np.ndarray) -> None:
        """Append the step that was sampled behind the row's context."""
        row.transcript.write(ids, logprobs)
        step = self.codec.parse_step(ids, len(row.steps) + 1)
        row.num_sampled += len(ids)
        row.was_cut_off = ids[-1] != self.codec.eos_id and ids[-1] not in self.codec.stop_ids
        if row.was_cut_off:
            step = Step(step.analysis, step.query, step.answer, is_well_formed=False)
        row.steps.append(step)

    def _go_on(self, rows: Mapping[Place, _Row]) -> tuple[dict[Place, Trajectory], dict[Place, Context]]:
        """Of rows that have just written a step: the trajectories that ended, and what the others are to continue.

        Those that ask are answered in one batched search.
        """
        ended: dict[Place, Trajectory] = {}
        contexts: dict[Place, Context] = {}
        asking: dict[Place, _Row] = {}
        for place, row in rows.items():
            step = row.steps[-1]
            if row.was_cut_off and self._num_left(row) == 0:
                ended[place] = row.finish(Status.NO_ANSWER)
            elif not step.is_well_formed:
                ended[place] = row.finish(Status.FORMAT_ERROR)
            elif step.answer is not None:
                ended[place] = row.finish(Status.ANSWERED)
            else:
                asking[place] = row
        self._retrieve(list(asking.values()))
        for place, row in asking.items():
            has_room = len(row.transcript.context) < self.max_length - 1
            if len(row.steps) < self.config.max_steps and has_room and self._num_left(row) > 0:
                contexts[place] = self._context(row)
            else:
                ended[place] = row.finish(Status.NO_ANSWER)
        return ended, contexts

    def _retrieve(self, rows: Sequence[_Row]) -> None:
        """One batched search for all rows; passages seen before make room for deeper hits."""
        if not rows:
            return
        depth = self.top_k + max(len(row.seen) for row in rows)
        hits = self.retriever.search([row.steps[-1].query or "" for row in rows], depth)
        for row, found in zip(rows, hits, strict=True):
            passages = select_passages(found, row.seen, self.top_k, max_passages=self.max_passages)
            row.seen |= {passage.id for passage in passages}
            row.steps[-1] = dataclasses.replace(row.steps[-1], passages=passages)
            row.transcript.splice(passages)


class Roller(_Loop):
    """Plays jobs with one engine, retriever and protocol."""

    def __init__(
        self,
        engine: Engine,
        codec: Codec,
        retriever: Retriever,
        config: RolloutConfig,
        *,
        top_k: int,
        max_passages: int,
    ):
        super().__init__(codec, retriever, config, engine.max_length, top_k, max_passages)
        self.engine = engine

    def play(self, params: Any, jobs: Sequence[Job], on_done: OnDone | None = None) -> list[Trajectory]:
        """See `Player`; `params` are the policy's."""
        self.engine.reset()
        done: dict[int, Trajectory] = {}
        queue = deque(enumerate(jobs))
        busy: dict[int, tuple[int, _Row]] = {}  # slot -> (place in jobs, row)
        while queue or busy:
            contexts: dict[int, Context] = {}
            for slot in self.engine.find(RowStatus.EMPTY)[: len(queue)]:
                place, job = queue.popleft()
                busy[slot] = place, _Row(job, self.codec)
                contexts[slot] = self._context(busy[slot][1])
            self.engine.set_context(params, contexts)
            leave_at = max(1, len(busy) // 4)
            self.engine.decode(params, self.config.decode_chunk, leave_at)
            waiting = self.engine.find(RowStatus.NEEDS_RETRIEVAL, RowStatus.DONE)
            for slot in waiting:
                self._read_slot(slot, busy[slot][1])
            ended, contexts = self._go_on({slot: busy[slot][1] for slot in waiting})
            self.engine.set_context(params, contexts)
            for slot, trajectory in ended.items():
                self.engine.release(slot)
                done[busy.pop(slot)[0]] = trajectory
                if on_done is not None:
                    on_done(trajectory)
        return [done[place] for place in range(len(jobs))]

    def _read_slot(self, slot: int, row: _Row) -> None:
        """Read what the slot has sampled since its last context."""
        start, end = len(row.transcript.context), int(self.engine.rows.lengths[slot])
        ids = self.engine.rows.tokens[slot, start:end].tolist()
        self._read(row, ids, self.engine.rows.logprobs[slot, start:end].copy())


class ServedRoller(_Loop):
    """Plays jobs with a user's inference server, `rollout.slots` requests in flight; see `sampler/server.py`."""

    def __init__(
        self,
        server: Server,
        codec: Codec,
        retriever: Retriever,
        config: RolloutConfig,
        *,
        top_k: int,
        max_passages: int,
    ):
        super().__init__(codec, retriever, config, config.max_length, top_k, max_passages)
        self.server = server

    def play(self, params: Any, jobs: Sequence[Job], on_done: OnDone | None = None) -> list[Trajectory]:
        """See `Player`; `params` are not used, the server has its own.

        Raises:
            UserError: the server failed. Requests in flight are awaited first, and `on_done` hears of what they end.
        """
        done: dict[int, Trajectory] = {}
        queue = deque(enumerate(jobs))
        rows: dict[int, _Row] = {}
        busy: dict[Future[Completion], int] = {}  # a request in flight -> its place in jobs
        failure: UserError | None = None
        with ThreadPoolExecutor(self.config.slots) as pool, self.server.session():
            while busy or (queue and failure is None):
                while queue and failure is None and len(busy) < self.config.slots:
                    place, job = queue.popleft()
                    rows[place] = _Row(job, self.codec)
                    busy[pool.submit(self.server.complete, self._context(rows[place]))] = place
                written = {}
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    place = busy.pop(future)
                    try:
                        completion = future.result()
                    except UserError as error:
                        failure = failure or error
                        self.server.give_up()
                        continue
                    self._read(rows[place], completion.ids, completion.behaviour_logprobs)
                    written[place] = rows[place]
                ended, contexts = self._go_on(dict(sorted(written.items())))
                for place, trajectory in ended.items():
                    done[place] = trajectory
                    if on_done is not None:
                        on_done(trajectory)
                if failure is None:
                    busy |= {pool.submit(self.server.complete, context): place for place, context in contexts.items()}
        if failure is not None:
            raise failure
        return [done[place] for place in range(len(jobs))]

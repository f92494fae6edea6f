"""Rollouts: sampler and retriever take turns until every trajectory has ended.

    queue ─► slots ─► decode ─► parse ─┬─ query ──► retrieve, splice, set_context ─┐
               ▲                       └─ answer, malformed, out of steps ─► done  │
               └───────────────────────────────────────────────────────────────────┘
A slot is refilled as soon as its row ends, so slow questions do not hold up the others.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from r3rag_jax.config import RolloutConfig
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.retrieval.passages import select_passages
from r3rag_jax.sampler.engine import Context, Engine
from r3rag_jax.sampler.state import RowStatus
from r3rag_jax.transcript import Codec, Transcript
from r3rag_jax.types import Question, Status, Step, Trajectory


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
    """A trajectory under way in a slot."""

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


class Roller:
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
        self.engine, self.codec, self.retriever, self.config = engine, codec, retriever, config
        self.top_k, self.max_passages = top_k, max_passages

    def play(
        self, params: Any, jobs: Sequence[Job], on_done: Callable[[Trajectory], None] | None = None
    ) -> list[Trajectory]:
        """Trajectories of the jobs, in their order. `on_done` hears of each as it ends.

        Raises:
            RetrievalError: a search failed; it is never taken for "nothing found".
        """
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
            ended = self._after_decode(params, {slot: row for slot, (_, row) in busy.items()})
            for slot, trajectory in ended.items():
                self.engine.release(slot)
                done[busy.pop(slot)[0]] = trajectory
                if on_done is not None:
                    on_done(trajectory)
        return [done[place] for place in range(len(jobs))]

    def _context(self, row: _Row) -> Context:
        """What the row is to continue. A prompt that does not fit the context at all is an error of the setting."""
        budget = min(self.config.max_new_tokens, self._num_left(row))
        return Context(row.transcript.context, budget, row.job.temperature, row.job.key(len(row.steps)))

    def _num_left(self, row: _Row) -> int:
        """Tokens that the trajectory may still sample."""
        limit = self.config.max_trajectory_tokens
        return limit - row.num_sampled if limit else self.engine.max_length * self.config.max_steps

    def _after_decode(self, params: Any, rows: dict[int, _Row]) -> dict[int, Trajectory]:
        """Read what the waiting rows wrote, retrieve for those that ask, and end those that are through."""
        ended: dict[int, Trajectory] = {}
        asking: dict[int, _Row] = {}
        for slot in self.engine.find(RowStatus.NEEDS_RETRIEVAL, RowStatus.DONE):
            row = rows[slot]
            step = self._read_step(slot, row)
            row.steps.append(step)
            if row.was_cut_off and self._num_left(row) == 0:
                ended[slot] = row.finish(Status.NO_ANSWER)
            elif not step.is_well_formed:
                ended[slot] = row.finish(Status.FORMAT_ERROR)
            elif step.answer is not None:
                ended[slot] = row.finish(Status.ANSWERED)
            else:
                asking[slot] = row
        self._retrieve(list(asking.values()))
        contexts: dict[int, Context] = {}
        for slot, row in asking.items():
            has_room = len(row.transcript.context) < self.engine.max_length - 1
            if len(row.steps) < self.config.max_steps and has_room and self._num_left(row) > 0:
                contexts[slot] = self._context(row)
            else:
                ended[slot] = row.finish(Status.NO_ANSWER)
        self.engine.set_context(params, contexts)
        return ended

    def _read_step(self, slot: int, row: _Row) -> Step:
        """The step that the slot has sampled since its last context."""
        start, end = len(row.transcript.context), int(self.engine.rows.lengths[slot])
        ids = self.engine.rows.tokens[slot, start:end].tolist()
        row.transcript.write(ids, self.engine.rows.logprobs[slot, start:end].copy())
        step = self.codec.parse_step(ids, len(row.steps) + 1)
        row.num_sampled += len(ids)
        row.was_cut_off = ids[-1] != self.codec.eos_id and ids[-1] not in self.codec.stop_ids
        if row.was_cut_off:
            return Step(step.analysis, step.query, step.answer, is_well_formed=False)
        return step

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

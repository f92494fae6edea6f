"""R3-RAG's protocol as an Env: reason, then query or answer, until it answers or a budget is used up.

A trajectory ends with ANSWERED at a final answer, with FORMAT_ERROR at a step that is malformed or longer than a step
may be, with NO_ANSWER when its steps or its sampled tokens are used up, and with CONTEXT_FULL when its context is: at a
step that `rollout.max_length` cut off, or at passages after which no step fits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from r3rag_jax.config import RolloutConfig
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.retrieval.selection import select_passages
from r3rag_jax.rollout.env import Done, EnvFactory, Search, StopRule
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.text.transcript import Codec, Transcript
from r3rag_jax.types import Completion, Context, Question, Status, Step, Trajectory


def search_env_factory(codec: Codec, config: RolloutConfig, *, top_k: int, max_passages: int) -> EnvFactory:
    """Return the factory of SearchEnvs; the arguments are those of `SearchEnv`."""
    make = functools.partial(SearchEnv, codec=codec, config=config, top_k=top_k, max_passages=max_passages)
    pause_ids, stop_ids = codec.ends

    def num_tokens(question: Question) -> int:
        return len(Transcript(codec, question.question).context) + config.max_new_tokens

    stops = StopRule(pause_ids, stop_ids, (*codec.stop_strings, *config.stop_strings))
    return EnvFactory(make, stops, num_tokens)


class SearchEnv:
    """One attempt at one question by R3-RAG's protocol."""

    def __init__(self, request: RolloutRequest, *, codec: Codec, config: RolloutConfig, top_k: int, max_passages: int):
        """Create the Env of a request.

        Args:
            top_k: maximum number of passages per retrieval.
            max_passages: maximum number of passages in the trajectory.
        """
        self._request, self._codec, self._config = request, codec, config
        self._top_k, self._max_passages = top_k, max_passages
        self._transcript = Transcript(codec, request.question.question)
        self._steps: list[Step] = []
        self._seen_ids: set[str] = set()  # of passages that the trajectory shows
        self._num_sampled = 0  # tokens, over all steps

    def start(self) -> Context:
        """See `Env.start`. A question that does not fit the context is to be left out before; see `fit.py`."""
        return self._context()

    def step(self, completion: Completion) -> Search | Done:
        """See `Env.step`."""
        ids = completion.ids
        self._transcript.write(ids, completion.behaviour_logprobs)
        self._num_sampled += len(ids)
        step = self._codec.parse_step(ids, len(self._steps) + 1)
        limit = self._limit_reached(ids) if self._is_cut_off(ids) else None
        if limit is not None:
            step = Step(step.analysis, step.query, step.answer, is_well_formed=False)
        self._steps.append(step)
        if limit is not None:
            return self._done(limit)
        if not step.is_well_formed:
            return self._done(Status.FORMAT_ERROR)
        if step.answer is not None:
            return self._done(Status.ANSWERED)
        return Search(step.query or "", self._top_k + len(self._seen_ids))

    def observe(self, hits: Sequence[Hit]) -> Context | Done:
        """See `Env.observe`. Passages that the trajectory has shown before are replaced by deeper hits."""
        passages = select_passages(hits, self._seen_ids, self._top_k, max_passages=self._max_passages)
        self._seen_ids |= {passage.id for passage in passages}
        self._steps[-1] = dataclasses.replace(self._steps[-1], passages=passages)
        self._transcript.add_passages(passages)
        if len(self._steps) >= self._config.max_steps or self._num_left <= 0:
            return self._done(Status.NO_ANSWER)
        if len(self._transcript.context) >= self._config.max_length - 1:
            return self._done(Status.CONTEXT_FULL)
        return self._context()

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps so far; the last one lacks its passages until they have been observed."""
        return tuple(self._steps)

    def preview(self, ids: Sequence[int]) -> Mapping[str, str]:
        """See `Codec.preview`, of the step that is being written."""
        return self._codec.preview(ids, len(self._steps) + 1)

    def _context(self) -> Context:
        context = self._transcript.context
        budget = min(self._config.max_new_tokens, self._num_left, self._config.max_length - len(context))
        return Context(context, budget, self._request.temperature, self._request.key(len(self._steps)))

    def _is_cut_off(self, ids: Sequence[int]) -> bool:
        """Whether a budget ended the step."""
        if ids[-1] in (*self._codec.end_ids, *self._codec.stop_ids):
            return False
        strings = (*self._codec.stop_strings, *self._config.stop_strings)
        return not strings or self._codec.tokenizer.end_of(strings, ids) == 0

    def _limit_reached(self, ids: Sequence[int]) -> Status:
        """How a trajectory ends whose last step, already written, was cut off.

        A step that used up its own budget broke the format, even where the context had no space left either.
        """
        if self._num_left <= 0:
            return Status.NO_ANSWER
        is_full = self._transcript.length >= self._config.max_length
        return Status.CONTEXT_FULL if is_full and len(ids) < self._config.max_new_tokens else Status.FORMAT_ERROR

    @property
    def _num_left(self) -> int:
        """Tokens that the trajectory may still sample."""
        limit = self._config.max_trajectory_tokens
        return limit - self._num_sampled if limit else self._config.max_length * self._config.max_steps

    def _done(self, status: Status) -> Done:
        samples = self._transcript.samples(self._request.temperature)
        request = self._request
        return Done(Trajectory(request.question, tuple(self._steps), status, samples, request.sample_index))

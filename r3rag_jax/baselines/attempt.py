"""The bookkeeping of an attempt that takes several completions: its steps, its tokens and its sampling keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from r3rag_jax.rollout.env import Done, Search
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion, Context, Passage, Status, Step, Trajectory


class Attempt:
    """One attempt at the question of a request."""

    def __init__(self, request: RolloutRequest, tokenizer: Tokenizer):
        self.question = request.question.question
        self._request, self._tokenizer = request, tokenizer
        self._steps: list[Step] = []
        self._num_sampled = 0  # tokens
        self._num_contexts = 0

    def read(self, completion: Completion) -> str:
        """Return the text of a completion, without special tokens."""
        self._num_sampled += len(completion.ids)
        return self._tokenizer.decode(self._tokenizer.without_end(completion.ids), skip_special=True)

    def context(self, ids: Sequence[int], budget: int) -> Context | Done:
        """Return the next context; without ids, the end: no prompt fits."""
        if not ids:
            return self.done()
        request = self._request
        key = request.key(self._num_contexts) if request.temperature > 0 else None
        self._num_contexts += 1
        return Context(ids, budget, request.temperature, key)

    def search(self, query: str, k: int, analysis: str = "") -> Search:
        """Begin a step that searches for `k` passages."""
        self._steps.append(Step(analysis, query=query))
        return Search(query, k)

    def observe(self, passages: Sequence[Passage]) -> None:
        """Give the last step what its search found."""
        self._steps[-1] = dataclasses.replace(self._steps[-1], passages=tuple(passages))

    def done(self, analysis: str = "", answer: str = "") -> Done:
        """End with an answer, of which the full stop is left out, or without one if it is empty.

        Without an answer the analysis is kept in a step that is not well formed.
        """
        if answer := answer.strip().rstrip(".").strip():
            self._steps.append(Step(analysis.strip(), answer=answer))
        elif analysis.strip():
            self._steps.append(Step(analysis.strip(), is_well_formed=False))
        status, steps = Status.ANSWERED if answer else Status.NO_ANSWER, tuple(self._steps)
        index = self._request.sample_index
        return Done(Trajectory(self._request.question, steps, status, (), index, self._num_sampled))

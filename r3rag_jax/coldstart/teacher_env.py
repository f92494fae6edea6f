"""Algorithm 1 of arXiv 2505.23794 as an Env: the teacher writes a step, the retriever answers its query, until it
answers the question or its steps are used up.

    transcript = question
    for step 1 … max_steps:
        the teacher writes step k from the prompt and the transcript
        malformed or cut off ─► FORMAT_ERROR        final answer ─► ANSWERED
        query ─► passages, appended to the transcript

Passages are those that a rollout of the policy would show: as many, cut to the same length, none twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from r3rag_jax.coldstart.journal import Reply
from r3rag_jax.coldstart.prompts import step_prompt
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.retrieval.selection import select_passages
from r3rag_jax.rollout.env import Done, Search
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.text.protocols import StepsProtocol, question_text
from r3rag_jax.types import Completion, Context, Passage, Status, Step, Trajectory

PROTOCOL = StepsProtocol()
# A teacher that makes up what its query brings is stopped there.
STOP = "\n" + PROTOCOL.render_passages([""]).rstrip()


class TeacherText(Protocol):
    """Text as the ids of a backend, there and back."""

    max_length: int  # most ids of prompt and reply together

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of a user message, after which the teacher replies."""
        ...

    def read(self, ids: Sequence[int]) -> Reply | None:
        """The reply that a completion holds; None where the request has failed."""
        ...


@dataclasses.dataclass(frozen=True)
class TeacherRules:
    """What all attempts have in common.

    Fields:
        template: see `prompts.py`.
        shown: the text of a passage as the policy sees it.
        top_k, max_passages: most passages of a retrieval, and of an attempt.
        max_tokens: budget of a step.
    """

    text: TeacherText
    template: str
    shown: Callable[[Passage], str]
    max_steps: int
    top_k: int
    max_passages: int
    max_tokens: int


class TeacherEnv:
    """One attempt of a teacher at one question. `has_failed`: the server has not answered one of its requests."""

    def __init__(self, request: RolloutRequest, rules: TeacherRules):
        self._request, self._rules = request, rules
        self._transcript = question_text(request.question)
        self._steps: list[Step] = []
        self._seen_ids: set[str] = set()  # of passages that the attempt shows
        self.has_failed = False

    def start(self) -> Context | Done:
        """See `Env.start`."""
        return self._context()

    def step(self, completion: Completion) -> Search | Done:
        """See `Env.step`."""
        reply = self._rules.text.read(completion.ids)
        if reply is None:
            self.has_failed = True
            return self._done(Status.NO_ANSWER)
        said = reply.text.rpartition("</think>")[2]  # what a reasoning model thinks is no part of the step
        written, stop, _ = said.partition(STOP)
        step = PROTOCOL.parse_step(written.strip(), len(self._steps) + 1)
        is_whole = reply.is_whole or stop != "" or _is_followed(step, written)
        if not is_whole or not step.is_well_formed:
            self._steps.append(Step(written.strip(), is_well_formed=False))
            return self._done(Status.FORMAT_ERROR)
        self._steps.append(step)
        if step.query is None:
            return self._done(Status.ANSWERED)
        return Search(step.query, self._rules.top_k + len(self._seen_ids))

    def observe(self, hits: Sequence[Hit]) -> Context | Done:
        """See `Env.observe`."""
        rules = self._rules
        passages = select_passages(hits, self._seen_ids, rules.top_k, max_passages=rules.max_passages)
        self._seen_ids |= {passage.id for passage in passages}
        step = self._steps[-1] = dataclasses.replace(self._steps[-1], passages=passages)
        written = PROTOCOL.render_step(step, len(self._steps))
        found = PROTOCOL.render_passages([rules.shown(passage) for passage in passages])
        self._transcript += f"\n{written}\n{found}"
        return self._done(Status.NO_ANSWER) if len(self._steps) >= rules.max_steps else self._context()

    def _context(self) -> Context | Done:
        rules, number = self._rules, len(self._steps)
        prompt = step_prompt(rules.template, self._transcript, number + 1, rules.max_steps)
        ids = rules.text.prompt_ids(prompt)
        if len(ids) + rules.max_tokens > rules.text.max_length:
            return self._done(Status.CONTEXT_FULL)
        return Context(ids, rules.max_tokens, self._request.temperature, self._request.key(number))

    def _done(self, status: Status) -> Done:
        request = self._request
        return Done(Trajectory(request.question, tuple(self._steps), status, sample_index=request.sample_index))


def _is_followed(step: Step, written: str) -> bool:
    """Whether the query or answer of a step is a whole line: a teacher that went on from there may be cut off."""
    if not step.is_well_formed:
        return False
    last = PROTOCOL.render_step(step, 1).rpartition("\n")[2]
    return last in map(str.strip, written.split("\n")[:-1])

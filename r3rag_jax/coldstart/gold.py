"""Trajectories of gold decompositions: their hops become steps, and the live retriever brings the passages.

For each hop the first wording of the query is taken that brings its evidence. The analysis says what the last hop has
shown, and what is needed next; a question without a wording that works is rejected, because its analysis would claim
what no passage has shown.

Every analysis after a search begins with the fact, whether another search follows or the answer: a policy that begins
to write has then read it before its words commit it to one or the other.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from r3rag_jax.coldstart.decomposition import Hop, hops_of
from r3rag_jax.coldstart.journal import Attempt, Facts
from r3rag_jax.coldstart.replay import NoBackend, write_step
from r3rag_jax.coldstart.sources import OnAttempt
from r3rag_jax.data.fields import FieldError
from r3rag_jax.retrieval.base import Hit, Retriever
from r3rag_jax.retrieval.selection import select_passages
from r3rag_jax.rewards.answer import normalize_answer
from r3rag_jax.rollout.env import Env, EnvFactory, Search, Transition
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Completion, Context, Passage, Question, Step, Trajectory

NO_EVIDENCE = "no wording of a query brings the evidence"
FIRST = (
    "Nothing is known yet. First I have to find out: {ask}",
    "The question depends on something that I do not know yet, so I look it up first: {ask}",
    "I begin with what the question rests on: {ask}",
)
NEXT = (
    "{fact} Next I have to find out: {ask}",
    "{fact} With that known, the next thing to look up is: {ask}",
    "{fact} Still missing: {ask}",
)
LAST = (
    "{fact} That is what the question asks for, so I can answer: {answer}",
    "{fact} Nothing is missing any more, and the answer is {answer}",
    "{fact} So all is known that the question needs. The answer is {answer}",
)


class GoldEnv:
    """The policy's Env, in which the steps of a decomposition are written; queries are tried out before they are."""

    def __init__(self, request: RolloutRequest, env: Env, codec: Codec, source: GoldSource):
        self._question, self._env, self._codec, self._source = request.question, env, codec, source
        self._hops = hops_of(request.question)
        self._seen_ids: set[str] = set()  # of passages that the trajectory shows
        self._num_found = 0  # hops whose step is written
        self._tried: list[Sequence[Hit]] = []  # what each wording of the next hop's query has brought

    def start(self) -> Transition:
        """See `Env.start`; it never returns a Context."""
        return self._go_on(self._env.start())

    def step(self, completion: Completion) -> Transition:
        """Not called: nothing is sampled."""
        raise AssertionError("the steps of a decomposition are given")

    def observe(self, hits: Sequence[Hit]) -> Transition:
        """See `Env.observe`: take this wording of the query, or try the next one."""
        self._tried.append(hits)
        hop, number = self._hops[self._num_found], len(self._tried)
        passages = self._source.select(hits, self._seen_ids)
        is_found = any(self._source.states(hop, passage) for passage in passages)
        if not is_found and number < len(hop.queries):
            return self._search()
        chosen = number - 1 if is_found else 0
        hits, self._tried = self._tried[chosen], []
        self._seen_ids |= {passage.id for passage in self._source.select(hits, self._seen_ids)}
        step = Step(analysis(self._question, self._hops, self._num_found), query=hop.queries[chosen])
        self._num_found += 1
        transition = write_step(self._env, self._codec, step, self._num_found, self._context)
        return self._go_on(self._env.observe(hits)) if isinstance(transition, Search) else transition

    def _go_on(self, transition: Transition) -> Transition:
        if not isinstance(transition, Context):
            return transition
        self._context = transition
        if self._num_found < len(self._hops):
            return self._search()
        last = Step(analysis(self._question, self._hops, self._num_found), answer=self._question.golden_answers[0])
        return write_step(self._env, self._codec, last, self._num_found + 1, transition)

    def _search(self) -> Search:
        query = self._hops[self._num_found].queries[len(self._tried)]
        return Search(query, self._source.top_k + len(self._seen_ids))


class GoldSource:
    """Attempts that follow gold decompositions: one a question."""

    num_attempts = 1

    def __init__(
        self,
        search_env: EnvFactory,
        codec: Codec,
        retriever: Retriever,
        corpus: Mapping[str, Passage] | None,
        *,
        top_k: int,
        max_passages: int,
        slots: int,
        facts: Facts,
    ):
        """
        Args:
            corpus: passages by id; None where it is not known which passages can be found.
            top_k, max_passages: most passages of a retrieval, and of a trajectory.
            slots: questions whose searches are batched.
        """
        self._search_env, self._codec, self._retriever, self._corpus = search_env, codec, retriever, corpus
        self.top_k, self._max_passages, self._slots, self.facts = top_k, max_passages, slots, facts

    def play(self, questions: Sequence[Question], number: int, on_attempt: OnAttempt) -> None:
        """See `Source.play`."""
        factory = EnvFactory(
            lambda request: GoldEnv(request, self._search_env(request), self._codec, self), self._search_env.stops
        )
        rollout(
            NoBackend(self._slots), factory, self._retriever, [RolloutRequest(q, number) for q in questions],
            on_done=lambda trajectory: on_attempt(Attempt.of(trajectory, 0.0), trajectory.question),
        )  # fmt: skip

    def fault_of(self, trajectory: Trajectory) -> str | None:
        """See `Source.fault_of`: every hop's evidence was shown by its step, or before."""
        shown: list[Passage] = []
        for hop, step in zip(hops_of(trajectory.question), trajectory.steps, strict=False):
            shown += step.passages
            if not any(self.states(hop, passage) for passage in shown):
                return NO_EVIDENCE
        return None

    def select(self, hits: Sequence[Hit], seen_ids: set[str]) -> tuple[Passage, ...]:
        """The passages that a step shows."""
        return select_passages(hits, seen_ids, self.top_k, max_passages=self._max_passages)

    def states(self, hop: Hop, passage: Passage) -> bool:
        """Whether a passage is evidence of a hop."""
        return hop.is_stated_in(passage, self._corpus is not None and hop.passage_id in self._corpus)


def decomposition_fault(question: Question) -> str | None:
    """Why a question has no decomposition to follow, for a message; None if it has one."""
    try:
        hops_of(question)
    except FieldError as error:
        return f"coldstart.source=gold needs a decomposition: {error}"
    return None


def analysis(question: Question, hops: Sequence[Hop], number: int) -> str:
    """The analysis of the step for hop `number` (from 0), or of the answer after all of them.

    The wording depends on the question's id alone, and is of one kind in all steps. An answer that is not that of the
    last hop is drawn from all facts.
    """
    pick = zlib.crc32(question.id.encode()) % len(FIRST)
    if number < len(hops):
        wordings = NEXT if number else FIRST
        fact = hops[number - 1].fact if number else ""
        return wordings[pick].format(fact=fact, ask=hops[number].ask)
    answer = question.golden_answers[0]
    is_last = normalize_answer(hops[-1].answer) == normalize_answer(answer)
    facts = [hops[-1].fact] if is_last else [hop.fact for hop in hops]
    text = LAST[pick].format(fact=" ".join(facts), answer=answer)
    return text if text.endswith(".") else f"{text}."

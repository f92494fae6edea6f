"""The contract between the scheduler and a way to answer questions.

An `Env` is one attempt at one question. Each method returns what must happen next, and the scheduler carries it out:

    start() ─┬─► Context ── sampled ──► step(completion) ─┐
             ├─► Search ── retrieved ─► observe(hits) ────┤
             └─► Done(trajectory)                         │
             ▲────────────────────────────────────────────┘
R3-RAG's protocol is `SearchEnv`; every baseline is another Env. An Env knows neither the backend nor the retriever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from r3rag_jax.retrieval.base import Hit
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.types import Completion, Context, Question, Trajectory


@dataclasses.dataclass(frozen=True)
class StopRule:
    """What ends a completion before its budget of tokens is used up; the same for all questions of a rollout."""

    pause_ids: tuple[int, ...] = ()  # tokens that end a step, after which retrieved passages may follow
    stop_ids: tuple[int, ...] = ()  # other tokens that end a completion
    stop_strings: tuple[str, ...] = ()  # text that ends a completion, wherever in a token it ends


@dataclasses.dataclass(frozen=True)
class Search:
    """Passages are needed: the `k` best hits for the query. `observe` may receive more than `k`."""

    query: str
    k: int


@dataclasses.dataclass(frozen=True)
class Done:
    """The question is finished."""

    trajectory: Trajectory


Transition = Context | Search | Done  # sample a completion of this context, retrieve, or finish


class Env(Protocol):
    """One attempt at one question. Each method returns what must happen next."""

    def start(self) -> Transition:
        """Begin; called once, before anything else."""
        ...

    def step(self, completion: Completion) -> Transition:
        """Read the completion of the last Context."""
        ...

    def observe(self, hits: Sequence[Hit]) -> Transition:
        """Read what the last Search found, best first; empty = nothing was found."""
        ...


@dataclasses.dataclass(frozen=True)
class EnvFactory:
    """A way to answer questions: makes an Env per request."""

    make: Callable[[RolloutRequest], Env]
    stops: StopRule  # of all completions of these Envs
    # Tokens that a question needs at least, for its first prompt without passages and a completion; None: not known.
    num_tokens: Callable[[Question], int] | None = None

    def __call__(self, request: RolloutRequest) -> Env:
        """Return a new Env for the request."""
        return self.make(request)

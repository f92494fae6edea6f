"""Rolls out a baseline with a model that writes given lines, over three passages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import tiny
from fake_backend import FakeBackend, LogprobsOf

from r3rag_jax.baselines.factory import BASELINES
from r3rag_jax.config import BaselinesConfig, Config, EvalConfig, RetrievalConfig, RolloutConfig
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.rollout.env import StopRule
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Context, Passage, Question, Trajectory

ORIGIN = Passage("a", '"Origin"\nOrigin was written by Charles Darwin.')
DARWIN = Passage(
    "b", '"Charles Darwin"\nCharles Darwin was an English naturalist.\nDarwin was born in Shrewsbury. He is known.'
)
GENESIS = Passage("c", '"Genesis"\nGenesis is a band.')
QUESTION = Question("q", "Where was the author of Origin born?", ("Shrewsbury",))


class Retriever(tiny.DictRetriever):
    """Keeps the queries and depths of its searches."""

    def __init__(self) -> None:
        super().__init__([ORIGIN, DARWIN, GENESIS])
        self.asked: list[tuple[str, int]] = []

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.asked += [(query, k) for query in queries]
        return super().search(queries, k)


@dataclasses.dataclass(frozen=True)
class Played:
    """A trajectory, and what was asked on its way."""

    trajectory: Trajectory
    prompts: list[str]
    contexts: list[Context]
    asked: list[tuple[str, int]]  # query, k
    stops: StopRule

    @property
    def queries(self) -> list[str]:
        return [query for query, _ in self.asked]

    @property
    def budgets(self) -> list[int]:
        return [context.budget for context in self.contexts]


def config_of(
    *, chat: bool = False, max_length: int = 8000, top_k: int = 1, max_passages: int = 10, **baselines: Any
) -> Config:
    """`baselines`: values of keys as `react__max_steps=2`."""
    settings = BaselinesConfig()
    for name, value in baselines.items():
        section, _, own = name.partition("__")
        settings = settings.replace(**{section: getattr(settings, section).replace(**{own: value}) if own else value})
    return Config(
        phases=("index",),
        rollout=RolloutConfig(max_length=max_length, max_new_tokens=8),
        retrieval=RetrievalConfig(top_k=top_k, max_passages=max_passages),
        eval=EvalConfig(prompt="chat" if chat else "reading"),
        baselines=settings,
    )


def play(
    tokenizer: Tokenizer, name: str, lines: Sequence[str], *, logprobs_of: LogprobsOf | None = None, **settings: Any
) -> Played:
    """Roll a baseline out; the model must be asked for each of the lines, and for no more."""
    waiting = iter(lines)
    backend = FakeBackend(
        lambda slot, context: tokenizer.encode(next(waiting)) or [tokenizer.eos_id], logprobs_of=logprobs_of
    )
    retriever = Retriever()
    env_factory = BASELINES[name](config_of(**settings), tokenizer)
    [trajectory] = rollout(backend, env_factory, retriever, [RolloutRequest(QUESTION)])
    assert next(waiting, None) is None
    prompts = [tokenizer.decode(context.ids) for context in backend.contexts]
    return Played(trajectory, prompts, backend.contexts, retriever.asked, env_factory.stops)

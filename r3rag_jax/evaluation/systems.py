"""What can be evaluated: each system is a policy and the Env that it answers questions in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from r3rag_jax.baselines.factory import BASELINES
from r3rag_jax.config import Config
from r3rag_jax.rollout.env import EnvFactory
from r3rag_jax.text.tokenizer import Tokenizer

BASE_POLICY = "base"  # the model before any training


class EnvParts(Protocol):
    """What an Env can be made of."""

    @property
    def config(self) -> Config: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def search_env(self) -> EnvFactory:
        """R3-RAG's protocol."""
        ...


@dataclasses.dataclass(frozen=True)
class System:
    """One line of a results table."""

    title: str
    policy: str  # BASE_POLICY, or the phase that trains it
    make_env: Callable[[EnvParts], EnvFactory]


def _baseline(title: str, name: str) -> System:
    return System(title, BASE_POLICY, lambda parts: BASELINES[name](parts.config, parts.tokenizer))


SYSTEMS = {
    "closed_book": _baseline("Closed book", "closed_book"),
    "cot": _baseline("CoT", "cot"),
    "naive_rag": _baseline("Naive RAG", "naive_rag"),
    "rag_cot": _baseline("RAG + CoT", "rag_cot"),
    "ircot": _baseline("IRCoT", "ircot"),
    "self_ask": _baseline("Self-Ask", "self_ask"),
    "iter_retgen": _baseline("ITER-RETGEN", "iter_retgen"),
    "react": _baseline("ReAct", "react"),
    "flare": _baseline("FLARE", "flare"),
    "cold_start": System("Cold start", "sft", lambda parts: parts.search_env),
    "r3rag": System("R3-RAG", "rl", lambda parts: parts.search_env),
}  # in the order of the tables

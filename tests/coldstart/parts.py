"""What the tests of the cold start builder share: passages, questions, a policy's Env, and a backend of replies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from fake_backend import FakeBackend
from scripted_teacher import ScriptedTeacher

from r3rag_jax.coldstart.prompts import TEACHER_PROMPT
from r3rag_jax.coldstart.sources import TeacherSource
from r3rag_jax.coldstart.teacher import WHOLE, ServedText
from r3rag_jax.coldstart.teacher_env import TeacherRules
from r3rag_jax.config import RolloutConfig
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.rollout.env import EnvFactory, StopRule
from r3rag_jax.rollout.search_env import search_env_factory
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Context, Passage, Question

PASSAGES = [
    Passage("a", '"Origin"\nOrigin was written by Charles Darwin.'),
    Passage("b", '"Charles Darwin"\nCharles Darwin was born in Shrewsbury.'),
    Passage("c", '"Genesis"\nGenesis was written by nobody.'),
    Passage("d", '"Capital"\nCapital was written by Karl Marx.'),
    Passage("e", '"Karl Marx"\nKarl Marx was born in Trier.'),
]


def question(id: str, work: str, author: str, town: str, passage_ids: tuple[str, str]) -> Question:
    hops = [
        {"sub_question": f"Who wrote {work}?", "answer": author, "passage_id": passage_ids[0]},
        {"sub_question": f"Where was {author} born?", "answer": town, "passage_id": passage_ids[1]},
    ]
    return Question(id, f"Where was the author of {work} born?", (town,), {"decomposition": hops})


DARWIN = question("q1", "Origin", "Charles Darwin", "Shrewsbury", ("a", "b"))
MARX = question("q2", "Capital", "Karl Marx", "Trier", ("d", "e"))
QUESTIONS = [DARWIN, MARX]

Answer = Callable[[str, float], str]  # prompt, temperature -> reply


def codec(path: Path, protocol: str = "steps", passage_tokens: int = 200) -> Codec:
    return Codec(tiny.tokenizer(path), make_protocol(protocol), passage_tokens)


def search_env(codec: Codec, **settings: Any) -> EnvFactory:
    config = RolloutConfig(**{"max_length": 4000, "max_new_tokens": 1000, "max_steps": 4} | settings)
    return search_env_factory(codec, config, top_k=1, max_passages=10)


def rules(codec: Codec, **settings: Any) -> TeacherRules:
    values: dict[str, Any] = {"max_steps": 4, "top_k": 1, "max_passages": 10, "max_tokens": 4000}
    return TeacherRules(ServedText(), TEACHER_PROMPT, codec.shown, **values | settings)


class WordRetriever(tiny.DictRetriever):
    """Compares words without question marks and commas."""

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        return super().search([query.replace("?", " ").replace(",", " ") for query in queries], k)


class Replies:
    """A backend that answers prompts by a function, and keeps them."""

    def __init__(self, answer: Answer):
        self.asked: list[tuple[str, float]] = []  # prompt, temperature

        def complete(slot: int, context: Context) -> list[int]:
            prompt = "".join(map(chr, context.ids))
            self.asked.append((prompt, context.temperature))
            return [*map(ord, answer(prompt, context.temperature)), WHOLE]

        self.backend = FakeBackend(complete)


def source(
    replies: Replies, codec: Codec, temperatures: tuple[float, ...] = (0.1, 0.9), retriever: Any = None
) -> TeacherSource:
    return TeacherSource(
        replies.backend, StopRule(), rules(codec), retriever or WordRetriever(PASSAGES),
        temperatures=temperatures, seed=0, search_overlap=0, facts={"teacher": "scripted"},
    )  # fmt: skip


def gold_answer(prompt: str, temperature: float) -> str:
    """A teacher that never errs."""
    return ScriptedTeacher(QUESTIONS).step(prompt, temperature)

"""A judge over a real HTTP server whose replies a test makes up."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openai_server import Reply, RunningServer, chat, serve

from r3rag_jax.config import EndpointConfig, JudgeConfig, MeshConfig
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.rewards.judge.factory import open_judge
from r3rag_jax.rewards.judge.judge import Judge, Verdicts
from r3rag_jax.rewards.judge.prompts import Inquiry
from r3rag_jax.types import Passage, Question, Step

ReplyTo = Callable[[dict[str, Any]], Reply]  # of the body of a request

QUESTION = Question("q", "Who wrote Origin?", ("Charles Darwin", "Darwin"))


def asking(judge: Judge, number: int) -> Inquiry:
    """The inquiry with this number in it."""
    return judge.relevance(QUESTION, Step("hm", query=f"number {number}.", passages=(Passage("a", "Darwin"),)))


def number_of(body: dict[str, Any]) -> int:
    found = re.search(r"number (\d+)\.", body["messages"][0]["content"])
    assert found is not None
    return int(found[1])


def tenths(body: dict[str, Any]) -> Reply:
    """A judge that finds number n relevant to n tenths; to those of its last digit."""
    return 200, chat(f"Because.\n**Relevance:** {number_of(body) % 10 / 10}")


def open_at(url: str, path: Path, **settings: Any) -> Judge:
    """`settings` are keys of `judge` or of `judge.endpoint`."""
    endpoint = {"url": url, "model": "m", "retries": 2}
    endpoint |= {name: settings.pop(name) for name in list(settings) if name in EndpointConfig.model_fields}
    config = JudgeConfig(endpoint=EndpointConfig(**endpoint), **settings)
    return open_judge(config, make_mesh(MeshConfig()), path, first_wait_s=0.001)


def ask(
    reply: ReplyTo, path: Path, numbers: Sequence[int] = range(10), **settings: Any
) -> tuple[Verdicts, RunningServer]:
    with serve(reply) as endpoint:
        judge = open_at(endpoint.url, path, **settings)
        return judge.ask([asking(judge, number) for number in numbers]), endpoint


def failing(times: int, status: int) -> ReplyTo:
    """A judge that is busy (`status`) so many times before it answers."""
    left = iter(range(times))
    return lambda body: (status, {"error": "busy"}) if next(left, None) is not None else tenths(body)

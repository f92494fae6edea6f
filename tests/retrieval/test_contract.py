"""What a retriever returns is held to the contract in one place, which all searches of the package pass."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend

import r3rag_jax
from r3rag_jax.retrieval.base import Hit, RetrievalError, search_hits
from r3rag_jax.rollout.env import Done, EnvFactory, Search, StopRule
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.types import Passage, Question

HIT = Hit(Passage("p", "x"), 1.0)
REPLIES: dict[str, tuple[Callable[[int], Any], str]] = {
    "none": (lambda n: None, "a retriever returns a row for each of 2 queries; got NoneType"),
    "too few": (lambda n: [[HIT]] * (n - 1), "a retriever returns a row for each of 2 queries; got 1"),
    "too many": (lambda n: [[HIT]] * (n + 1), "a retriever returns a row for each of 2 queries; got 3"),
    "a generator": (lambda n: ([HIT] for _ in range(n)), "got generator"),
    "a row of none": (lambda n: [None] * n, "a row of a retriever holds hits; got None"),
    "passages": (lambda n: [[HIT.passage]] * n, "a row of a retriever holds hits; got [Passage"),
    "more than k": (lambda n: [[HIT] * 4] * n, "a row of a retriever holds at most 3 hits; got 4"),
}


class Broken:
    fingerprint = "f"

    def __init__(self, reply: Callable[[int], Any]):
        self._reply = reply

    def search(self, queries: Sequence[str], k: int) -> Any:
        return self._reply(len(queries))


class SearchingEnv:
    """Searches once."""

    def start(self) -> Search:
        return Search("who?", 3)

    def observe(self, hits: Sequence[Hit]) -> Done:
        raise AssertionError("a broken reply is observed")


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_that_breaks_the_contract_is_a_retrieval_error_that_says_what_came(name: str) -> None:
    reply, message = REPLIES[name]
    with pytest.raises(RetrievalError) as error:
        search_hits(Broken(reply), ["who?", "where?"], 3)
    assert message in str(error.value) and str(error.value).startswith("search failed for 'who?'")


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("overlap", [0, 2])
def test_a_rollout_ends_with_it(name: str, overlap: int) -> None:
    env_factory = EnvFactory(lambda request: SearchingEnv(), StopRule())  # type: ignore[arg-type, return-value]
    requests = [RolloutRequest(Question(str(i), "?", ("a",))) for i in range(2)]
    backend = FakeBackend(lambda slot, context: [1])
    with pytest.raises(RetrievalError, match=r"a retriever returns|a row of a retriever"):
        rollout(backend, env_factory, Broken(REPLIES[name][0]), requests, search_overlap=overlap)


def test_no_part_of_the_package_asks_a_retriever_by_itself() -> None:
    """`retriever.search(…)` stands in `search_hits` alone."""
    package = Path(r3rag_jax.__file__).parent
    calls = [
        str(file.relative_to(package))
        for file in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "search"
        if ast.unparse(node.func.value).removeprefix("self._").removeprefix("self.") == "retriever"
    ]
    assert calls == ["retrieval/base.py"]

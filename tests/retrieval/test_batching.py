"""Requests of many clients as few searches: what is searched together, and that no request depends on another."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from r3rag_jax.retrieval.base import Hit, RetrievalError, Retriever
from r3rag_jax.retrieval.batching import Batcher
from r3rag_jax.serving.refusal import Refusal
from r3rag_jax.types import Passage


class Recorder:
    """A retriever whose hits name query and rank; it waits for `gate`, and fails on the query `break`."""

    fingerprint = "recorder"

    def __init__(self) -> None:
        self.gate, self.searches = threading.Event(), []  # type: ignore[var-annotated]

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.searches.append((list(queries), k))
        assert self.gate.wait(20)
        if "break" in queries:
            raise RuntimeError("broken")
        return [[Hit(Passage(f"{query}-{rank}", query), float(-rank)) for rank in range(k)] for query in queries]


class Observed(list):  # type: ignore[type-arg]
    def searched(self, num_queries: int, seconds: float) -> None:
        self.append(num_queries)


def ids(rows: list[list[Hit]]) -> list[list[str]]:
    return [[hit.passage.id for hit in row] for row in rows]


def open_batcher(retriever: Retriever, **settings: int) -> Batcher:
    sizes = {"max_batch": 4, "max_waiting": 10} | settings
    batcher = Batcher(lambda: retriever, wait_s=0.0, observer=Observed(), **sizes)  # type: ignore[arg-type]
    batcher.start()
    return batcher


def wait_until_searching(recorder: Recorder, num_searches: int = 1) -> None:
    deadline = threading.Event()
    for _ in range(2000):
        if len(recorder.searches) >= num_searches:
            return
        deadline.wait(0.005)
    raise AssertionError(recorder.searches)


def test_requests_that_wait_are_searched_together_but_for_other_k() -> None:
    recorder = Recorder()
    batcher = open_batcher(recorder)
    first = batcher.search(["a"], 2)
    wait_until_searching(recorder)
    others = [batcher.search(queries, k) for queries, k in ((["b", "c"], 1), (["d"], 2), (["e"], 1), (["f"], 1))]
    assert batcher.num_waiting == 5
    recorder.gate.set()
    assert ids(first.result(20)) == [["a-0", "a-1"]]
    assert [ids(one.result(20)) for one in others] == [[["b-0"], ["c-0"]], [["d-0", "d-1"]], [["e-0"]], [["f-0"]]]
    # Four queries at most: f comes later.
    assert recorder.searches == [(["a"], 2), (["b", "c", "e"], 1), (["d"], 2), (["f"], 1)]
    assert batcher.search([], 3).result(20) == []
    batcher.close()


def test_a_request_larger_than_a_batch_is_searched_alone() -> None:
    recorder = Recorder()
    recorder.gate.set()
    batcher = open_batcher(recorder)
    assert len(batcher.search(list("abcdefg"), 1).result(20)) == 7
    batcher.close()


def test_a_request_that_fails_fails_no_other() -> None:
    recorder = Recorder()
    batcher = open_batcher(recorder)
    first = batcher.search(["a"], 1)
    wait_until_searching(recorder)
    broken, fine = batcher.search(["break"], 1), batcher.search(["b"], 1)
    recorder.gate.set()
    assert ids(first.result(20)) == [["a-0"]] and ids(fine.result(20)) == [["b-0"]]
    with pytest.raises(RuntimeError, match="broken"):
        broken.result(20)
    batcher.close()


def test_a_retriever_that_returns_the_wrong_number_of_rows_has_failed() -> None:
    class Short(Recorder):
        def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
            return []

    batcher = open_batcher(Short())
    with pytest.raises(RetrievalError, match="a row for each of 2 queries; got 0"):
        batcher.search(["a", "b"], 1).result(20)
    batcher.close()


def test_more_than_may_wait_is_refused_and_what_waits_at_the_end_too() -> None:
    recorder = Recorder()
    batcher = open_batcher(recorder, max_waiting=3)
    batcher.search(["a"], 1)
    wait_until_searching(recorder)
    waiting = batcher.search(["b"] * 5, 1)  # a large request waits where no other does
    with pytest.raises(Refusal, match="at most 3 queries may wait; 5 do") as caught:
        batcher.search(["c"], 1)
    assert (caught.value.status, caught.value.headers["retry-after"]) == (503, "1")
    batcher.close()
    with pytest.raises(Refusal, match="shutting down"):
        waiting.result(20)
    with pytest.raises(Refusal, match="shutting down"):
        batcher.search(["d"], 1)
    recorder.gate.set()


def test_a_client_that_has_left_costs_no_search() -> None:
    recorder = Recorder()
    batcher = open_batcher(recorder)
    first = batcher.search(["a"], 1)
    wait_until_searching(recorder)
    left, stays = batcher.search(["b"], 1), batcher.search(["c"], 1)
    assert left.cancel()
    recorder.gate.set()
    assert ids(stays.result(20)) == [["c-0"]] and first.done()
    assert recorder.searches == [(["a"], 1), (["c"], 1)]
    batcher.close()

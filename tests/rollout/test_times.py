"""What is measured of rollouts: seconds by what they were used for, and searches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from openai_server import chat, serve
from test_endpoint import BODY, PATH, open_at
from test_scheduler import STOPS, PlanEnv, Recorder

from r3rag_jax.retrieval.base import Hit, RetrievalError
from r3rag_jax.rollout.env import EnvFactory
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.rollout.times import RolloutTimes
from r3rag_jax.run.counters import counted
from r3rag_jax.types import Question

PARTS = {"prefill_s", "decode_s", "search_wait_s", "score_s"}


def measured(plans: str, recorder: Recorder, **options: int) -> RolloutTimes:
    times = RolloutTimes()
    requests = [RolloutRequest(Question(chr(ord("a") + n), plan, ())) for n, plan in enumerate(plans.split(","))]
    rollout(recorder, EnvFactory(PlanEnv, STOPS), recorder, requests, times=times, **options)
    return times


@pytest.mark.parametrize("overlap", [0, 2])
def test_every_batched_search_is_timed(overlap: int) -> None:
    recorder = Recorder()
    times = measured("csc,c,cscsc", recorder, search_overlap=overlap)
    assert len(times.searches) == sum(isinstance(event, tuple) for event in recorder.events) > 1
    metrics = times.metrics
    assert metrics.keys() == PARTS | {"search_p50_s", "search_p95_s"}
    assert min(times.searches) <= metrics["search_p50_s"] <= metrics["search_p95_s"] <= max(times.searches)
    assert metrics["prefill_s"] > 0 and metrics["decode_s"] > 0 and metrics["score_s"] == 0


def test_percentiles_are_of_searches() -> None:
    times = RolloutTimes()
    times.searches = [0.1 * number for number in range(1, 101)]
    assert times.metrics["search_p50_s"] == pytest.approx(5.05)
    assert times.metrics["search_p95_s"] == pytest.approx(9.505)


def test_without_a_search_there_are_no_percentiles() -> None:
    assert measured("c", Recorder()).metrics.keys() == PARTS


def test_a_failed_search_is_no_search_time() -> None:
    class Failing(Recorder):
        def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
            raise RetrievalError("away")

    times = RolloutTimes()
    request = RolloutRequest(Question("a", "csc", ()))
    with pytest.raises(RetrievalError):
        rollout(recorder := Failing(), EnvFactory(PlanEnv, STOPS), recorder, [request], times=times)
    assert times.searches == [] and times.metrics["search_wait_s"] > 0


def test_repeated_requests_are_counted_by_the_section_of_their_server() -> None:
    before = counted("judge.endpoint failed")
    replies = iter([503, 429, 200])
    with serve(lambda _: (next(replies), chat("yes"))) as server:
        open_at(server.url).call(PATH, BODY)
    assert counted("judge.endpoint failed") == before + 2

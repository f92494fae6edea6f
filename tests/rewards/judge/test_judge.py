"""A round of a judge over a real HTTP server, and every way to fail."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judging import ask, asking, failing, number_of, open_at, tenths
from openai_server import MODEL, Reply, chat, serve

from r3rag_jax.errors import UserError


def test_a_round_over_http(tmp_path: Path) -> None:
    verdicts, endpoint = ask(tenths, tmp_path / "j.jsonl", [3, 7, 3], model="", max_tokens=99)
    np.testing.assert_allclose(verdicts.values, [0.3, 0.7, 0.3])
    assert verdicts.values.dtype == np.float32
    assert (verdicts.num, verdicts.num_known, verdicts.num_failed) == (2, 0, 0)
    assert len(endpoint.bodies) == 2  # the same is asked once
    for body in endpoint.bodies:
        [message] = body.pop("messages")
        assert message["role"] == "user" and "Who wrote Origin?" in message["content"]
        assert "Darwin" in message["content"] and "{" not in message["content"]
        assert body == {"model": MODEL, "temperature": 0.0, "max_tokens": 99}


def test_requests_are_in_flight_together(tmp_path: Path) -> None:
    together = threading.Barrier(4)  # breaks, and fails the test, unless four wait at once

    def reply(body: dict[str, Any]) -> Reply:
        together.wait(timeout=20)
        return tenths(body)

    verdicts, endpoint = ask(reply, tmp_path / "j.jsonl", range(8), max_in_flight=4)
    np.testing.assert_allclose(verdicts.values, np.arange(8) / 10)
    assert endpoint.most_busy == 4


def test_the_key_is_sent_and_never_kept_or_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j.jsonl"
    with pytest.raises(UserError, match=r"key_env names the environment variable MY_KEY: it is not set"):
        ask(tenths, path, [1], key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "secret-1")
    _, endpoint = ask(tenths, path, [1], key_env="MY_KEY")
    assert {headers["Authorization"] for headers in endpoint.headers} == {"Bearer secret-1"}
    with pytest.raises(UserError) as caught:
        ask(lambda _: (401, {"error": "no such key: secret-1"}), path, [2], key_env="MY_KEY")
    assert "answered 401" in str(caught.value) and "judge.endpoint.key_env names the variable" in str(caught.value)
    assert "secret" not in str(caught.value) + path.read_text()


# ------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_judge_is_asked_again(status: int, tmp_path: Path) -> None:
    with serve(failing(2, status)) as endpoint:
        judge = open_at(endpoint.url, tmp_path / "j", max_in_flight=1)
        verdicts = judge.ask([asking(judge, 4)])
    assert verdicts.values == np.float32(0.4) and verdicts.num_failed == 0
    assert len(endpoint.bodies) == 3


def test_requests_per_minute_are_those_of_the_configuration(tmp_path: Path) -> None:
    started = time.monotonic()
    verdicts, _ = ask(tenths, tmp_path / "j", range(4), requests_per_minute=300)
    assert verdicts.num_failed == 0 and time.monotonic() - started > 3 * 60 / 300


def test_a_judge_that_is_down_ends_the_run_with_its_name_after_the_retries(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ask(lambda _: (503, b"loading"), tmp_path / "j", range(100), max_in_flight=1)
    assert re.search(
        r"the judge m at http://127\.0\.0\.1:\d+/v1 failed in 21 of 100 judgements, more than judge\."
        r"max_failure_share=0\.2 allows; .*/j keeps the others; the first failure: judge\.endpoint\.url: http://127\.0\.0\.1:"
        r"\d+/v1/chat/completions failed, attempt 3 of 3: 503 loading",
        str(caught.value),
    ), caught.value


def test_a_judge_that_is_down_is_not_asked_for_hours(tmp_path: Path) -> None:
    """One call has all its retries; each other one has one attempt, and those that cannot change anything none."""
    with serve(lambda _: (503, b"")) as endpoint:
        judge = open_at(endpoint.url, tmp_path / "j", max_in_flight=1, retries=3)
        with pytest.raises(UserError):
            judge.ask([asking(judge, n) for n in range(10)])
        assert len(endpoint.bodies) == 4 + 4  # the fifth failure ends a round of ten, and no further one was in flight
        endpoint.bodies.clear()
        with pytest.raises(UserError, match="attempt 4 of 4"):
            judge.ask([asking(judge, 0)])
        assert len(endpoint.bodies) == 4  # a new round begins anew, and one failure of one is enough: nothing came


def test_nobody_listens(tmp_path: Path) -> None:
    with serve(tenths) as endpoint:
        pass
    judge = open_at(endpoint.url, tmp_path / "j", model="", retries=1)
    words = rf"judge\.endpoint\.url: {endpoint.url}/models failed, attempt 2 of 2: .*refused"
    with pytest.raises(UserError, match=words):
        judge.ask([asking(judge, 1)])


def test_a_slow_judge_has_failed_where_it_is_late(tmp_path: Path) -> None:
    is_over = threading.Event()

    def reply(body: dict[str, Any]) -> Reply:
        if number_of(body) == 3:
            is_over.wait(20)
        return tenths(body)

    with serve(reply) as endpoint:
        judge = open_at(endpoint.url, tmp_path / "j", retries=0, timeout_s=2.0)
        verdicts = judge.ask([asking(judge, n) for n in range(8)])
        is_over.set()
    assert np.flatnonzero(np.isnan(verdicts.values)).tolist() == [3]
    assert verdicts.num_failed == 1
    failures = [
        row["failure"] for line in (tmp_path / "j").read_text().splitlines() if "failure" in (row := json.loads(line))
    ]
    assert len(failures) == 1 and "timed out" in failures[0]


NONSENSE: tuple[Any, ...] = (
    chat("I would rather not say."),
    chat("Relevance: 7"),
    chat("Relevance: 0.9", "length"),  # of 0.95, for all one knows
    chat(None),
    chat(["Relevance: 0.9"]),
    {"choices": []},
    {"choices": ["Relevance: 0.9"]},
    {"error": "Relevance: 0.9"},
    [],
    b"<html>Relevance: 0.9</html>",
)


@pytest.mark.parametrize("place", range(len(NONSENSE)))
def test_nonsense_has_failed_and_earns_nothing(place: int, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return (200, NONSENSE[place]) if number_of(body) == 2 else tenths(body)

    verdicts, endpoint = ask(reply, tmp_path / "j", range(6))
    assert np.isnan(verdicts.values).tolist() == [False, False, True, False, False, False]
    assert verdicts.metrics["judge_failure_rate"] == pytest.approx(1 / 6)
    assert len(endpoint.bodies) == 6  # greedy: asked again it would say the same
    verdicts, endpoint = ask(tenths, tmp_path / "j", range(6))
    assert [number_of(body) for body in endpoint.bodies] == [2]  # a failure is no judgement
    assert not np.isnan(verdicts.values).any()


def test_a_judge_of_nonsense_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ask(lambda _: (200, NONSENSE[0]), tmp_path / "j", range(30))
    assert "http://127.0.0.1" in str(caught.value)
    assert "must reply with one line like 'Relevance: 0.7'; got 'I would rather not say.'" in str(caught.value)


@pytest.mark.parametrize(("num_failing", "ends"), [(10, False), (11, True)])
def test_half_of_the_judgements_fail(num_failing: int, ends: bool, tmp_path: Path) -> None:
    """Up to max_failure_share they are left out, beyond it the run ends; what was judged is kept either way."""

    def reply(body: dict[str, Any]) -> Reply:
        return (500, b"") if number_of(body) < num_failing else tenths(body)

    path = tmp_path / "j"
    settings = {"max_failure_share": 0.5, "retries": 0, "max_in_flight": 1}
    if ends:
        with pytest.raises(UserError, match=r"failed in 11 of 20 judgements, more than judge\.max_failure_share=0\.5"):
            ask(reply, path, range(19, -1, -1), **settings)  # the good ones first
    else:
        verdicts, _ = ask(reply, path, range(19, -1, -1), **settings)
        assert np.isnan(verdicts.values[::-1]).tolist() == [True] * 10 + [False] * 10
    _, endpoint = ask(lambda body: (200, chat("Relevance: 1")), path, range(20), **settings)
    assert sorted(number_of(body) for body in endpoint.bodies) == list(range(num_failing))


def test_of_few_judgements_one_may_fail(tmp_path: Path) -> None:
    """Late in a run nearly all is known: a single odd reply is a large share of nothing."""
    verdicts, _ = ask(lambda body: (200, NONSENSE[0]), tmp_path / "j", [1])
    assert np.isnan(verdicts.values).all() and verdicts.metrics["judge_failure_rate"] == 1

"""The client of a served teacher over real sockets: what is sent, what is kept, what a minute allows."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai_server import MODEL, Reply, RunningServer, chat, serve

from r3rag_jax.coldstart import journal as journal_module
from r3rag_jax.coldstart.journal import Journal, open_journal
from r3rag_jax.coldstart.spending import TokenLimit, cost
from r3rag_jax.coldstart.teacher import CUT_OFF, FAILED, WHOLE, ServedBackend, ServedText, TeacherClient
from r3rag_jax.config import ColdStartConfig, TeacherConfig
from r3rag_jax.errors import UserError
from r3rag_jax.rollout.env import StopRule
from r3rag_jax.types import Context

TEXT = ServedText()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with open_journal(tmp_path / "journal.jsonl", print) as opened:
        yield opened


def client_of(server: RunningServer, journal: Journal, **settings: Any) -> TeacherClient:
    cold = {name: settings.pop(name) for name in list(settings) if name in ColdStartConfig.model_fields}
    teacher = TeacherConfig(url=server.url, **{"retries": 1, "max_in_flight": 4} | settings)
    return TeacherClient(ColdStartConfig(teacher=teacher, **cold), journal, first_wait_s=0.001)


def context(prompt: str, temperature: float = 0.4, key: int = 6) -> Context:
    return Context(TEXT.prompt_ids(prompt), 77, temperature, np.asarray([key, 1], np.uint32))


def echo(body: dict[str, Any]) -> Reply:
    text = body["messages"][0]["content"].upper()
    return 200, chat(text) | {"usage": {"prompt_tokens": 10, "completion_tokens": 3}}


def text_of(ids: list[int]) -> str:
    reply = TEXT.read(ids)
    assert reply is not None
    return reply.text


def test_a_reply_is_asked_for_once_and_kept(journal: Journal) -> None:
    with serve(echo) as server:
        client = client_of(server, journal, model="m", price_input=2.0, price_output=8.0)
        with client.session():
            first = client.complete(context("naïve 🙂"))
            assert client.complete(context("naïve 🙂")).ids == first.ids
            client.complete(context("naïve 🙂", key=8))  # another attempt, or another step
            client.complete(context("naïve 🙂", temperature=0.5))
    assert (text_of(first.ids), first.ids[-1], first.logprobs) == ("NAÏVE 🙂", WHOLE, None)
    assert len(server.bodies) == 3
    assert server.bodies[0] == {
        "model": "m", "messages": [{"role": "user", "content": "naïve 🙂"}], "temperature": 0.4, "max_tokens": 77,
        "stop": ["\nThe retrieval documents:"], "seed": 3,
    }  # fmt: skip
    assert cost(journal, TeacherConfig(price_input=2.0, price_output=8.0)) == pytest.approx((30 * 2 + 9 * 8) / 1e6)


def test_the_servers_model_is_asked_for(journal: Journal) -> None:
    with serve(echo) as server:
        assert client_of(server, journal).model == MODEL


@pytest.mark.parametrize(
    ("reply", "end", "counts"),
    [
        (chat("half", "length"), CUT_OFF, (None, None)),
        (chat("") | {"usage": None}, WHOLE, (None, None)),
        (chat("x", "content_filter") | {"usage": {"prompt_tokens": "7", "completion_tokens": 2}}, WHOLE, (None, 2)),
    ],
)
def test_how_a_reply_ends_and_counts(
    journal: Journal, reply: dict[str, Any], end: int, counts: tuple[int | None, int | None]
) -> None:
    with serve(lambda _: (200, reply)) as server:
        ids = client_of(server, journal).complete(context("x")).ids
    assert ids[-1] == end
    [row] = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert (row["input_tokens"], row["output_tokens"]) == counts


@pytest.mark.parametrize("reply", [(503, b"busy"), (400, b"no"), (200, {"choices": []}), (200, chat(None))])
def test_a_failure_is_recorded_and_asked_again(journal: Journal, reply: Reply) -> None:
    replies = [reply, reply] if reply[0] == 503 else [reply]
    left = iter(replies)
    with serve(lambda body: next(left, echo(body))) as server:
        client = client_of(server, journal)
        assert client.complete(context("x")).ids == [FAILED] and TEXT.read([FAILED]) is None
        assert len(client.failures) == 1
        assert text_of(client.complete(context("x")).ids) == "X"
    kinds = [json.loads(line)["kind"] for line in journal.path.read_text().splitlines()]
    assert kinds == ["failure", "reply"]


def test_a_server_that_fails_too_often_ends_the_build(journal: Journal) -> None:
    def fails(body: dict[str, Any]) -> Reply:
        return echo(body) if body["messages"][0]["content"] in ("0", "1") else (500, b"out of memory")

    with serve(fails) as server:
        client = client_of(server, journal, max_failure_share=0.5)
        ends = [client.complete(context(str(number))).ids[-1] for number in range(6)]
        with pytest.raises(UserError, match=r"failed in 5 of 7 requests, more than coldstart.max_failure_share=0.5"):
            client.complete(context("6"))
    assert ends == [WHOLE, WHOLE, FAILED, FAILED, FAILED, FAILED]


def test_requests_under_way_when_a_build_ends_are_kept(journal: Journal) -> None:
    """Ctrl-C while two requests wait for their reply: both are paid for, so both are in the journal."""
    may_answer, asked = threading.Event(), threading.Semaphore(0)

    def slow(body: dict[str, Any]) -> Reply:
        asked.release()
        assert may_answer.wait(20)
        return echo(body)

    with serve(slow) as server:
        client = client_of(server, journal)
        with pytest.raises(KeyboardInterrupt):
            with ServedBackend(client, 2).generate(StopRule()) as generation:
                generation.submit({0: context("a"), 1: context("b")})
                assert asked.acquire(timeout=20) and asked.acquire(timeout=20)
                threading.Timer(0.05, may_answer.set).start()
                raise KeyboardInterrupt
        assert journal.num_replies == 2
        with client.session():
            assert text_of(client.complete(context("a")).ids) == "A"
    assert len(server.bodies) == 2


def test_a_failure_because_a_build_ends_is_none(journal: Journal) -> None:
    asked = threading.Event()

    def busy(body: dict[str, Any]) -> Reply:
        asked.set()
        return 503, b"busy"

    with serve(busy) as server:
        client = TeacherClient(
            ColdStartConfig(teacher=TeacherConfig(url=server.url, retries=5, model="m")), journal, first_wait_s=60
        )
        with pytest.raises(KeyboardInterrupt), ServedBackend(client, 1).generate(StopRule()) as generation:
            generation.submit({0: context("a")})
            assert asked.wait(20)
            raise KeyboardInterrupt
    assert client.failures == [] and journal.path.read_bytes() == b""


class Clock:
    time = 100.0

    def __call__(self) -> float:
        return self.time


def test_tokens_per_minute() -> None:
    clock = Clock()
    limit = TokenLimit(600, clock)  # ten a second
    assert [limit.reserve(50) for _ in range(3)] == [0, 5, 10]
    limit.give_back(100)  # two used nothing
    assert limit.reserve(0) == 5
    clock.time += 60
    assert [limit.reserve(10), limit.reserve(10)] == [0, 1]  # what was not used is not saved up
    limit.give_back(-20)
    assert limit.reserve(0) == 4


def test_the_client_waits_for_its_tokens(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waited = Clock(), list[float]()
    with serve(echo) as server:
        teacher = TeacherConfig(url=server.url, model="m", tokens_per_minute=600)
        client = TeacherClient(ColdStartConfig(teacher=teacher), journal, clock=clock)

        def pause(seconds: float) -> bool:
            waited.append(seconds)
            return False

        monkeypatch.setattr(client._endpoint, "pause", pause)
        for number in range(3):
            client.complete(context(f"{number} " + 396 * "x"))
    # 398 // 4 + 77 tokens are reserved at first, of which the server counts 13.
    assert waited == pytest.approx([0, 1.3, 2.6])


def test_the_rows_of_a_journal_are_documented() -> None:
    text = journal_module.__doc__ or ""
    assert all(f'"kind": "{kind}"' in text for kind in ("journal", "reply", "attempt", "failure"))


def test_a_session_ends_with_its_error(journal: Journal) -> None:
    check: Callable[[], Any] = lambda: client.complete(context("x"))  # noqa: E731
    with serve(lambda _: (401, b"who are you?")) as server:
        client = client_of(server, journal, max_failure_share=0.0)
        for _ in range(4):
            assert check().ids == [FAILED]
        with pytest.raises(UserError, match=r"the first failure: coldstart.teacher.url: .* answered 401 who are you"):
            check()

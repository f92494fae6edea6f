"""A served chat model: what is asked, and which replies are errors."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from openai_server import MODEL, Reply, chat, serve

from r3rag_jax.clients.chat import ChatClient
from r3rag_jax.clients.endpoint import Endpoint
from r3rag_jax.config import EndpointConfig
from r3rag_jax.errors import UserError


def open_at(url: str, **settings: Any) -> ChatClient:
    fields: dict[str, Any] = {"url": url, "model": "m", "max_in_flight": 4, "retries": 1, "timeout_s": 20.0}
    return ChatClient(
        Endpoint(EndpointConfig(**fields | settings), name="judge.endpoint", first_wait_s=0.001), max_tokens=9
    )


def echo(body: dict[str, Any]) -> Reply:
    return 200, chat(body["messages"][0]["content"].upper())


def test_a_prompt_is_one_greedy_user_message() -> None:
    with serve(echo) as server:
        client = open_at(server.url, model="")
        assert list(client.reply_all(["who?"])) == [(0, "WHO?")]
    [body] = server.bodies
    assert body == {
        "model": MODEL, "messages": [{"role": "user", "content": "who?"}], "temperature": 0.0, "max_tokens": 9,
    }  # fmt: skip
    assert (client.model, client.identity, client.location) == (MODEL, MODEL, server.url)
    assert open_at("http://elsewhere").identity == "m"  # wherever it is served


def test_prompts_are_asked_together_and_replies_keep_their_index() -> None:
    together = threading.Barrier(4)  # breaks, and fails the test, unless four wait at once

    def reply(body: dict[str, Any]) -> Reply:
        together.wait(timeout=20)
        return echo(body)

    with serve(reply) as server:
        replies = dict(open_at(server.url).reply_all([f"n{i}" for i in range(8)]))
    assert replies == {i: f"N{i}" for i in range(8)} and server.most_busy == 4


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (chat("Relevance: 0", "length"), "must answer in 9 tokens; got"),  # of 0.85, for all one knows
        (chat(None), "must answer choices with a message's content; got"),
        (chat(["text"]), "must answer choices with a message's content; got"),
        ({"choices": []}, "must answer choices with a message's content; got"),
        ({"choices": ["text"]}, "must answer choices with a message's content; got"),
        ({"error": "text"}, "must answer choices with a message's content; got"),
        ([], "must answer choices with a message's content; got []"),
        (b"<html>", "must answer JSON; got <html>"),
    ],
    ids=range(8),
)
def test_a_malformed_reply_is_an_error_in_its_place(value: Any, rule: str) -> None:
    with serve(lambda body: (200, value) if body["messages"][0]["content"] == "n2" else echo(body)) as server:
        replies = dict(open_at(server.url).reply_all([f"n{i}" for i in range(4)]))
    error = replies.pop(2)
    assert isinstance(error, UserError) and rule in str(error)
    assert str(error).startswith(f"judge.endpoint.url: {server.url}/chat/completions must answer")
    assert replies == {i: f"N{i}" for i in (0, 1, 3)} and len(server.bodies) == 4


def test_giving_up_starts_nothing_new_and_a_new_round_begins_anew() -> None:
    is_down = True
    with serve(lambda body: (503, b"loading") if is_down else echo(body)) as server:
        client = open_at(server.url, max_in_flight=1)
        replies = {}
        for index, reply in client.reply_all(["n"] * 50):
            replies[index] = reply
            client.give_up()
        assert "503 loading" in str(replies[0]) and 1 <= len(replies) < 10
        is_down = False
        assert dict(client.reply_all(["n"] * 3)) == dict.fromkeys(range(3), "N")
        some = client.reply_all(["n"] * 50)
        assert next(some) == (0, "N")
        some.close()  # a caller that leaves
    assert len(server.bodies) < 50

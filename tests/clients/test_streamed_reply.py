"""Streamed completions: as those that are not, in every dialect; heard as they come, and dropped on request."""

from __future__ import annotations

import json
import queue
import socket
import threading
from typing import Any

import pytest
from openai_server import Reply, completion, serve

from r3rag_jax.clients.completions import CompletionsClient
from r3rag_jax.clients.streamed_reply import StreamedReply
from r3rag_jax.config import RolloutConfig, ServerConfig
from r3rag_jax.errors import UserError
from r3rag_jax.rollout.live_sampling import Draft, News, ServerSampler
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion, Context

WAIT_S = 30
TEXT = "<think> a é </think><answer> b </answer>"
CONTEXT = Context((70, 71), 99)


def whole_reply(dialect: str, tokenizer: Tokenizer) -> dict[str, Any]:
    ids = tokenizer.encode(TEXT)
    tokens, values = [tokenizer.decode([id]) for id in ids], [-0.5 * i for i in range(len(ids))]
    spelled = {"tokens": [f"token_id:{id}" for id in ids], "token_logprobs": values}
    content = [{"id": i, "token": t, "logprob": v} for i, t, v in zip(ids, tokens, values, strict=True)]
    fields: dict[str, dict[str, Any]] = {
        "vllm": {"token_ids": ids, "logprobs": spelled, "stop_reason": ids[-1]},
        "llama": {"logprobs": {"content": content}},
        "sglang": {"matched_stop": ids[-1]},
        "openai": {},
    }
    return completion(TEXT, **fields[dialect])


def streamed(reply: dict[str, Any], num_events: int) -> bytes:
    """The events by which a server streams a reply: pieces of all its lists, and its end by itself."""
    [choice] = reply["choices"]
    ends = {name: choice[name] for name in ("finish_reason", "stop_reason", "matched_stop") if name in choice}
    events = []
    for number in range(num_events):

        def piece(values: Any, number: int = number) -> Any:
            return values[len(values) * number // num_events : len(values) * (number + 1) // num_events]

        event = {"text": piece(choice["text"]), "finish_reason": None}
        if "token_ids" in choice:
            event["token_ids"] = piece(choice["token_ids"])
        if "logprobs" in choice:
            event["logprobs"] = {name: piece(values) for name, values in choice["logprobs"].items()}
        events.append({"choices": [event]})
    events += [{"choices": [{"text": ""} | ends]}, {"choices": [], "usage": {"completion_tokens": 9}}]
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events]
    return "".join([": a comment\n\n", *lines, "data: [DONE]\n\n"]).encode()


def open_client(url: str, tokenizer: Tokenizer) -> CompletionsClient:
    stops = tokenizer.encode("</query></answer>")
    config = RolloutConfig(server=ServerConfig(url=url, model="m", retries=1))
    return CompletionsClient(config, tokenizer, stop_ids=stops, first_wait_s=0.01)


@pytest.mark.parametrize("dialect", ["vllm", "llama", "sglang", "openai"])
def test_a_streamed_completion_is_the_whole_one(dialect: str, tokenizer: Tokenizer) -> None:
    whole = whole_reply(dialect, tokenizer)
    heard: list[list[int]] = []
    replies = iter([(503, {}), (200, streamed(whole, 7)), (200, whole), (200, whole)])  # also of a server that does not
    with serve(lambda body: next(replies)) as server:
        client = open_client(server.url, tokenizer)
        found, unstreamed = client.complete(CONTEXT, heard.append), client.complete(CONTEXT, heard.append)
        expected = client.complete(CONTEXT)
    assert [body.get("stream", False) for body in server.bodies] == [True, True, True, False]
    for one in (found, unstreamed):
        assert one.ids == expected.ids
        assert one.behaviour_logprobs.tolist() == pytest.approx(expected.behaviour_logprobs.tolist(), nan_ok=True)
    assert heard and tokenizer.decode(heard[-1]) == TEXT


def test_text_is_heard_when_it_comes_however_it_is_cut(tokenizer: Tokenizer) -> None:
    content = streamed(whole_reply("vllm", tokenizer), 7)
    for size in (1, 7, 10_000):
        heard: list[str] = []
        reply = StreamedReply(heard.append)
        for start in range(0, len(content), size):
            reply.feed(content[start : start + size])
        assert heard[-1] == TEXT and all(TEXT.startswith(text) for text in heard)
        assert len(heard) == (1 if size > len(content) else 7)


@pytest.mark.parametrize(
    "content",
    [b"data: {\n\n", b"nothing", b'data: {"error": "full"}\n\n', b"data: 3\n\n", b'data: {"choices": [{}]}\n\n'],
)
def test_malformed_streams_end_in_a_line(content: bytes, tokenizer: Tokenizer) -> None:
    with serve(lambda body: (200, content)) as server, pytest.raises(UserError, match="must answer"):
        open_client(server.url, tokenizer).complete(CONTEXT, lambda ids: None)


def test_a_dropped_completion_ends_its_request(tokenizer: Tokenizer) -> None:
    """The server sends events until its client is gone; the pool's only thread is free for the next."""
    event = f"data: {json.dumps({'choices': [{'text': 'x', 'finish_reason': None}]})}\n\n".encode()
    is_gone = threading.Event()
    news: queue.Queue[tuple[Draft, News]] = queue.Queue()

    def stream(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            try:
                while not is_gone.wait(0.01):
                    connection.sendall(event)
            except OSError:
                is_gone.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=stream, args=(listener,))
        thread.start()
        client = open_client(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", tokenizer)
        sampler = ServerSampler(client, 1)
        sampler.start(lambda draft, said: news.put((draft, said)))
        draft = Draft(0, "rl", CONTEXT)
        sampler.begin(draft)
        told, ids = news.get(timeout=WAIT_S)
        assert told is draft and isinstance(ids, list) and set(tokenizer.decode(ids)) == {"x"}
        sampler.cancel(draft)
        assert is_gone.wait(WAIT_S)
        thread.join(WAIT_S)
    sampler.close()


def test_a_sampler_tells_what_the_server_writes_or_why_not(tokenizer: Tokenizer) -> None:
    whole = whole_reply("vllm", tokenizer)
    replies: list[Reply] = [(200, streamed(whole, 3)), (400, {"error": "no"})]
    news: queue.Queue[tuple[Draft, News]] = queue.Queue()
    with serve(lambda body: replies.pop(0)) as server:
        sampler = ServerSampler(open_client(server.url, tokenizer), 1)
        sampler.start(lambda draft, said: news.put((draft, said)))
        for _ in range(2):
            sampler.begin(Draft(0, "rl", CONTEXT))
        told = [news.get(timeout=WAIT_S)[1] for _ in range(3)]
        sampler.close()
    assert isinstance(told[0], list) and isinstance(told[1], Completion) and isinstance(told[2], UserError)
    assert told[1].ids == whole["choices"][0]["token_ids"]

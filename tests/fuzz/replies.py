"""Replies of servers, and requests to ours: search, chat, completions, embeddings, bodies of the search server."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from corpora import encyclopedia
from openai_server import completion

from r3rag_jax.clients.chat import ChatClient
from r3rag_jax.clients.completion_reply import CompletionReader
from r3rag_jax.clients.embeddings import EmbeddingsClient
from r3rag_jax.clients.endpoint import Endpoint
from r3rag_jax.clients.transport import Reply
from r3rag_jax.config import EndpointConfig, RolloutConfig, ServerConfig
from r3rag_jax.config.retrieval import RemoteRetrieverConfig
from r3rag_jax.config.serving import ServeConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Hit, RetrievalError, search_hits
from r3rag_jax.retrieval.batching import Batcher
from r3rag_jax.retrieval.http import HttpRetriever
from r3rag_jax.retrieval.server.app import Application, IndexInfo
from r3rag_jax.retrieval.server.metrics import ServerMetrics
from tests.fuzz import mutate
from tests.fuzz.target import READ, REFUSED, Run, ensure, refused

URL = "http://127.0.0.1:1"
STATUSES = (200,) * 20 + (201, 204, 301, 400, 401, 404, 422, 500, 503)


class FakeTransport:
    """Answers every request with one reply, without a socket."""

    def __init__(self) -> None:
        self.reply = Reply(200, {}, b"")

    def send(self, method: str, url: str, content: bytes | None = None, feed: Any = None) -> Reply:
        """See `Transport.send`."""
        return self.reply

    def set(self, tree: Any, rng: random.Random) -> None:
        """The next reply: a value, nearly, and sometimes a status that is no success."""
        content = mutate.json_text(mutate.changed(tree, rng, 2), rng).encode("utf-8", "surrogatepass")
        headers = {"Retry-After": rng.choice(("0", "1", "x", "-1", "9" * 400, "²"))} if rng.random() < 0.1 else {}
        self.reply = Reply(rng.choice(STATUSES), headers, mutate.maybe_damaged(content, rng, 0.1))


def _endpoint(transport: FakeTransport, name: str) -> Endpoint:
    endpoint = Endpoint(EndpointConfig(url=URL, model="m", retries=0), name=name, wait=lambda seconds: None)
    endpoint._transport = transport  # type: ignore[assignment]
    return endpoint


def open_search_replies(directory: Path) -> Run:
    """Replies of a retrieval server in each format: a row of hits for each query, or a RetrievalError."""
    transport, documents = FakeTransport(), [{"id": "a", "contents": "x"}, {"_id": 1, "title": "T", "text": "y"}]
    scored = [document | {"score": 0.5} for document in documents]
    trees = {
        "native": {"fingerprint": "f", "results": [scored, scored]},
        "search_r1": {"result": [documents, [{"document": document, "score": 1} for document in documents]]},
        "r3rag": documents,
        "r3rag_batch": [documents, []],
    }
    retrievers = {}
    for name in trees:
        config = RemoteRetrieverConfig(url=URL, format=name, retries=0, max_in_flight=1)  # type: ignore[arg-type]
        retrievers[name] = HttpRetriever(config)
        retrievers[name]._endpoint._transport = transport  # type: ignore[assignment]

    def run(rng: random.Random) -> str:
        name, k = rng.choice(sorted(trees)), rng.randrange(1, 4)
        transport.set(trees[name], rng)
        queries = ["one"] if name == "r3rag" else ["one", mutate.text(rng)]
        retrievers[name]._native_fingerprint = None
        try:
            rows = search_hits(retrievers[name], queries, k)
        except RetrievalError as error:
            return refused(error, URL)
        ensure(all(np.isfinite(hit.score) and hit.passage.contents.strip() for row in rows for hit in row), rows)
        ensure(all(isinstance(hit.passage.id, str) for row in rows for hit in row), rows)
        return READ

    return run


def open_chat_replies(directory: Path) -> Run:
    """Replies of a judge or teacher: the text that the server sent, or an error in its place."""
    transport = FakeTransport()
    client = ChatClient(_endpoint(transport, "judge.endpoint"), max_tokens=9)
    tree = {"choices": [{"message": {"role": "assistant", "content": "Relevance: 1"}, "finish_reason": "stop"}]}

    def run(rng: random.Random) -> str:
        transport.set(tree, rng)
        [(index, reply)] = client.reply_all([mutate.text(rng)])
        ensure(index == 0, index)
        if isinstance(reply, UserError):
            return refused(reply, URL)
        ensure(reply == json.loads(transport.reply.content)["choices"][0]["message"]["content"], reply)
        return READ

    return run


def open_embedding_replies(directory: Path) -> Run:
    """Replies of an embedding server: finite vectors of one size, or an error."""
    transport = FakeTransport()
    client = EmbeddingsClient(
        _endpoint(transport, "retrieval.encoder.endpoint"), batch_texts=8, encoding_format="float"
    )
    tree = {"data": [{"index": i, "embedding": [0.5, 1, -2.0]} for i in range(3)]}
    encoded = {"data": [{"index": i, "embedding": "AACAPwAAAEA="} for i in range(3)]}

    def run(rng: random.Random) -> str:
        transport.set(rng.choice((tree, encoded)), rng)
        try:
            vectors = client.embed(["a", "b", "c"])
        except UserError as error:
            return refused(error, URL)
        ensure(vectors.shape[0] == 3 and vectors.shape[1] > 0 and bool(np.isfinite(vectors).all()), vectors)
        return READ

    return run


def open_completion_replies(directory: Path) -> Run:
    """Replies of an inference server: ids of the vocabulary with a log-probability each or none, or an error."""
    from r3rag_jax.clients.completions import CompletionsClient
    from r3rag_jax.types import Context

    tokenizer = tiny.tokenizer(directory / "tokenizer")
    stops = [tokenizer.token_id("</query>"), tokenizer.token_id("</answer>")]
    config = RolloutConfig(max_length=99, server=ServerConfig(url=URL, model="m", retries=0))
    client = CompletionsClient(config, tokenizer, stop_ids=stops)
    transport = FakeTransport()
    client._endpoint._transport = transport  # type: ignore[assignment]
    ids = tokenizer.encode("<think> a </think><query> b </query>")
    texts = [tokenizer.decode([id]) for id in ids]
    logprobs = {"tokens": texts, "token_logprobs": [-0.5] * len(ids)}
    content = {"content": [{"id": id, "token": "x", "logprob": -1} for id in ids]}
    forms = [
        completion("<think> a </think><query> b", token_ids=ids, logprobs=logprobs),
        completion("".join(texts), logprobs=logprobs),
        completion("".join(texts), logprobs=content, stop_reason=stops[0]),
        completion("a", logprobs={"tokens": [f"token_id:{id}" for id in ids], "token_logprobs": [-1.0] * len(ids)}),
        completion("<answer> x", finish_reason="length"),
    ]
    context = Context([1, 2, 3], 20, 1.0, np.asarray([1, 2], np.uint32))

    def run(rng: random.Random) -> str:
        transport.set(rng.choice(forms), rng)
        try:
            found = client.complete(context)
        except UserError as error:
            return refused(error, URL)
        ensure(len(found.ids) > 0 and all(0 <= id < tokenizer.vocab_size for id in found.ids), found.ids)
        values = found.behaviour_logprobs
        ensure(values is None or (len(values) == len(found.ids) and not np.isinf(values).any()), values)
        return READ

    ensure(isinstance(client._reader, CompletionReader), "another reader")
    return run


class _Corpus:
    """A retriever that is quick."""

    fingerprint = "f"

    def __init__(self) -> None:
        self._hits = [Hit(passage, 1.0) for passage in encyclopedia()[:5]]

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Retriever.search`."""
        return [self._hits[:k] for _ in queries]


def open_server_bodies(directory: Path) -> Run:
    """Requests to the search server, in process: an answer, or a refusal in a sentence with a documented status."""
    config = ServeConfig(max_body_bytes=20_000, max_query_chars=200, batch_wait_ms=0.0)
    batcher = Batcher(_Corpus, max_batch=64, wait_s=0.0, max_waiting=1000, observer=ServerMetrics())
    application = Application(batcher, IndexInfo("faiss", 5), config, "", ServerMetrics())
    batcher.start()
    batcher.opened.result(60)
    loop = asyncio.new_event_loop()
    trees = (
        ("/v1/search", {"queries": ["a", "b"], "k": 3}),
        ("/retrieve", {"queries": ["a"], "topk": 2, "return_scores": True}),
        ("/search", {"query": "a"}),
        ("/search", {"querys": ["a", "b"]}),
    )

    async def post(path: str, body: bytes, content_type: bytes) -> tuple[int, bytes]:
        sent: list[Any] = []
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return waiting.pop() if waiting else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2), "headers": [(b"content-type", content_type), (b"host", b"x")],
        }  # fmt: skip
        await application.gate(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

    def run(rng: random.Random) -> str:
        path, tree = rng.choice(trees)
        body = mutate.json_text(mutate.changed(tree, rng, 2), rng).encode("utf-8", "surrogatepass")
        body = mutate.maybe_damaged(body, rng, 0.2)
        kind = rng.choice((b"application/json",) * 9 + (b"", b"text/plain", b"application/json; charset=\xff"))
        status, content = loop.run_until_complete(post(path, body, kind))
        reply = json.loads(content)
        if status == 200:
            rows = reply["results"] if path == "/v1/search" else reply["result"] if path == "/retrieve" else reply
            ensure(isinstance(rows, list), reply)
            return READ
        ensure(status in (400, 413, 415, 422), (status, reply))
        ensure(list(reply) == ["detail"] and 0 < len(reply["detail"]) < 1000, reply)
        return REFUSED

    return run

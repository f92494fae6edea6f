"""A small real OpenAI-compatible server for tests: an HTTP server in a thread, and our engine behind it."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from r3rag_jax.components import Session
from r3rag_jax.sampler.state import RowStatus
from r3rag_jax.types import Context

Reply = tuple[int, Any]  # status, and a JSON value or bytes as they stand
Asked = tuple[tuple[int, ...], int, tuple[int, ...]]  # ids, budget, ids that end it
Written = tuple[list[int], list[float]]  # ids and their log-probabilities
MODEL = "tiny"


class Endpoint:
    """What a running server has heard, and where it is."""

    def __init__(self, url: str):
        self.url = url
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_busy = self.most_busy = 0  # requests under way at once


@contextlib.contextmanager
def serve(reply: Callable[[dict[str, Any]], Reply], extra_headers: dict[str, str] | None = None) -> Iterator[Endpoint]:
    """`reply` answers the bodies of /v1/completions and /v1/chat/completions, from a thread each."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": MODEL}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                endpoint.bodies.append(body)
                endpoint.headers.append(dict(self.headers))
                endpoint.num_busy += 1
                endpoint.most_busy = max(endpoint.most_busy, endpoint.num_busy)
            try:
                assert self.path == ("/v1/chat/completions" if "messages" in body else "/v1/completions")
                status, value = reply(body)
            finally:
                with lock:
                    endpoint.num_busy -= 1
            self.answer(status, value)

        def answer(self, status: int, value: Any) -> None:
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in (extra_headers or {}).items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # a client that has left is no news
                super().handle_error(request, client_address)

    server = Listener(("127.0.0.1", 0), Handler)
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(text: str, finish: str = "stop", **fields: Any) -> dict[str, Any]:
    """The reply of a server that tells no more than OpenAI's API asks for."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish} | fields]}


def chat(text: Any, finish: str = "stop") -> dict[str, Any]:
    """The reply of /v1/chat/completions."""
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


class EngineReply:
    """Answers with our engine, in the dialect of a server:

    vllm      ids, text with its end, the end by name
    tokens    ids as the text of the log-probabilities' tokens (vLLM of old)
    llama     ids beside the log-probabilities, which lack a stop string like the text
    sglang    no ids; text with its end, tokens as text, the end by name
    openai    no ids, no log-probabilities, no name of the end, and the text lacks it
    """

    def __init__(self, session: Session, policy: Any, dialect: str = "vllm"):
        self.session, self.policy, self.dialect = session, policy, dialect
        self.written: dict[Asked, Written] = {}
        self._lock, self._waiting = threading.Lock(), set[Asked]()

    def __call__(self, body: dict[str, Any]) -> Reply:
        tokenizer = self.session.tokenizer
        assert (body["model"], body["temperature"]) == (MODEL, 0.0)
        prompt = body["prompt"]
        prompt = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        stops = {id for text in body["stop"] if len(ids := tokenizer.encode(text)) == 1 for id in ids}
        asked = tuple(prompt), body["max_tokens"], tuple(sorted(stops | {tokenizer.eos_id}))
        self._waiting.add(asked)
        with self._lock:  # whoever gets it works for all who wait
            if asked not in self.written:
                time.sleep(0.02)
                self._generate(asked[2])
        return 200, self.render(*self.written[asked], stops)

    def _generate(self, stops: tuple[int, ...]) -> None:
        engine = self.session.engine
        batch = [asked for asked in list(self._waiting) if asked[2] == stops][: engine.slots]
        engine.reset()
        engine.stop_at((), stops)
        engine.set_context(self.policy, {row: Context(ids, budget) for row, (ids, budget, _) in enumerate(batch)})
        while len(engine.find(RowStatus.DONE)) < len(batch):
            engine.decode(self.policy, 512, len(batch))
        for row, asked in enumerate(batch):
            written = slice(len(asked[0]), int(engine.rows.lengths[row]))
            rows = engine.rows
            self.written[asked] = rows.tokens[row, written].tolist(), rows.logprobs[row, written].tolist()
            self._waiting.discard(asked)

    def render(self, ids: list[int], logprobs: list[float], stops: set[int]) -> dict[str, Any]:
        tokenizer, eos = self.session.tokenizer, self.session.tokenizer.eos_id
        has_ended = ids[-1] in {*stops, eos}
        finish, name = ("stop", tokenizer.decode(ids[-1:])) if has_ended else ("length", None)
        whole, trimmed = tokenizer.decode(ids), tokenizer.decode(ids[:-1] if has_ended else ids)
        name = None if ids[-1] == eos else name  # as vLLM: its own end is nobody's stop string
        tokens = [tokenizer.decode([id]) for id in ids]
        spelled = {"tokens": tokens, "token_logprobs": logprobs}
        if self.dialect == "vllm":
            return completion(whole, finish, token_ids=ids, logprobs=spelled, stop_reason=name)
        if self.dialect == "tokens":
            spelled["tokens"] = [f"token_id:{id}" for id in ids]
            return completion(trimmed, finish, logprobs=spelled, stop_reason=name)
        if self.dialect == "llama":
            told = len(ids) - (name is not None)
            rows = [{"id": i, "token": t, "logprob": v} for i, t, v in zip(ids, tokens, logprobs, strict=True)]
            return completion(trimmed, finish, logprobs={"content": rows[:told]})
        if self.dialect == "sglang":
            return completion(whole, finish, logprobs=spelled, matched_stop=name)
        return completion(trimmed, finish)

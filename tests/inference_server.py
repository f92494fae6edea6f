"""The engine behind the HTTP server of `openai_server.py`, in the dialects of several inference servers."""

from __future__ import annotations

import threading
import time
from typing import Any

from openai_server import MODEL, Reply, completion

from r3rag_jax.components import Components
from r3rag_jax.sampler.state import RowStatus
from r3rag_jax.sampler.stops import StopTokens
from r3rag_jax.types import Context

Asked = tuple[tuple[int, ...], int, tuple[int, ...]]  # ids, budget, ids that end it
Written = tuple[list[int], list[float]]  # ids and their log-probabilities


class EngineReply:
    """Answers with our engine, in the dialect of a server:

    vllm      ids, text with its end, the end by name
    tokens    ids as the text of the log-probabilities' tokens (vLLM of old)
    llama     ids beside the log-probabilities, which lack a stop string like the text
    sglang    no ids; text with its end, tokens as text, the end by name
    openai    no ids, no log-probabilities, no name of the end, and the text lacks it
    """

    def __init__(self, components: Components, policy: Any, dialect: str = "vllm"):
        self.components, self.policy, self.dialect = components, policy, dialect
        self.written: dict[Asked, Written] = {}
        self._lock, self._waiting = threading.Lock(), set[Asked]()

    def __call__(self, body: dict[str, Any]) -> Reply:
        tokenizer = self.components.policy.tokenizer
        assert (body["model"], body["temperature"]) == (MODEL, 0.0)
        prompt = body["prompt"]
        prompt = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        stops = {id for text in body["stop"] if len(ids := tokenizer.encode(text)) == 1 for id in ids}
        asked = tuple(prompt), body["max_tokens"], tuple(sorted({*stops, *tokenizer.end_ids}))
        self._waiting.add(asked)
        with self._lock:  # whoever gets it works for all who wait
            if asked not in self.written:
                time.sleep(0.02)
                self._generate(asked[2])
        return 200, self.render(*self.written[asked], stops)

    def _generate(self, stops: tuple[int, ...]) -> None:
        engine = self.components.engine
        batch = [asked for asked in list(self._waiting) if asked[2] == stops][: engine.slots]
        engine.reset()
        engine.set_context(self.policy, {row: Context(ids, budget) for row, (ids, budget, _) in enumerate(batch)})
        while len(engine.find(RowStatus.DONE)) < len(batch):
            engine.decode(self.policy, 512, len(batch), StopTokens(stop_ids=stops))
        for row, asked in enumerate(batch):
            written = slice(len(asked[0]), int(engine.rows.lengths[row]))
            rows = engine.rows
            self.written[asked] = rows.tokens[row, written].tolist(), rows.logprobs[row, written].tolist()
            self._waiting.discard(asked)

    def render(self, ids: list[int], logprobs: list[float], stops: set[int]) -> dict[str, Any]:
        tokenizer = self.components.policy.tokenizer
        has_ended = ids[-1] in {*stops, *tokenizer.end_ids}
        finish, name = ("stop", tokenizer.decode(ids[-1:])) if has_ended else ("length", None)
        whole, trimmed = tokenizer.decode(ids), tokenizer.decode(ids[:-1] if has_ended else ids)
        name = None if ids[-1] in tokenizer.end_ids else name  # as vLLM: its own end is nobody's stop string
        tokens = [tokenizer.decode([id]) for id in ids]
        spelled = {"tokens": tokens, "token_logprobs": logprobs}
        if self.dialect == "vllm":
            return completion(whole, finish, token_ids=ids, logprobs=spelled, stop_reason=name)
        if self.dialect == "tokens":
            spelled["tokens"] = [f"token_id:{id}" for id in ids]
            return completion(trimmed, finish, logprobs=spelled, stop_reason=name)
        if self.dialect == "llama":
            num_shown = len(ids) - (name is not None)
            rows = [{"id": i, "token": t, "logprob": v} for i, t, v in zip(ids, tokens, logprobs, strict=True)]
            return completion(trimmed, finish, logprobs={"content": rows[:num_shown]})
        if self.dialect == "sglang":
            return completion(whole, finish, logprobs=spelled, matched_stop=name)
        return completion(trimmed, finish)

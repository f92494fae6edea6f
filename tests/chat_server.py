"""A chat model on the engine behind the HTTP server of `openai_server.py`: `/v1/chat/completions` of our own."""

from __future__ import annotations

import threading
import time
from typing import Any

from openai_server import Reply, chat

from r3rag_jax.sampler.engine import complete_all
from r3rag_jax.sampler.local import LocalModel
from r3rag_jax.sampler.stops import StopTokens
from r3rag_jax.text.message_frame import MessageFrame
from r3rag_jax.types import Context

Asked = tuple[str, int]  # prompt, budget


class ChatReply:
    """Answers chat requests greedily; those that come together are decoded together."""

    def __init__(self, model: LocalModel):
        self._model, self._frame = model, MessageFrame.chat(model.tokenizer)
        self._written: dict[Asked, tuple[list[int], list[int]]] = {}  # ids of prompt and reply
        self._lock, self._waiting = threading.Lock(), set[Asked]()

    def __call__(self, body: dict[str, Any]) -> Reply:
        assert body["temperature"] == 0.0
        [message] = body["messages"]
        asked = message["content"], body["max_tokens"]
        self._waiting.add(asked)
        with self._lock:  # whoever gets it works for all who wait
            if asked not in self._written:
                time.sleep(0.05)
                self._generate()
        prompt, ids = self._written[asked]
        tokenizer = self._model.tokenizer
        said = tokenizer.without_end(ids)
        text, stop, _ = tokenizer.decode(said, skip_special=True).partition(body["stop"][0])
        reply = chat(text, "stop" if stop or len(said) < len(ids) else "length")
        return 200, reply | {"usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}}

    def _generate(self) -> None:
        batch = list(self._waiting)
        contexts = [Context(self._frame.ids(prompt), budget) for prompt, budget in batch]
        engine, decoder = self._model.engine, self._model.decoder
        stops = StopTokens(stop_ids=self._model.tokenizer.end_ids)
        for index, ids in complete_all(engine, decoder, contexts, stops, chunk=64, leave_at=len(batch)):
            self._written[batch[index]] = [*contexts[index].ids], ids
        self._waiting -= set(batch)

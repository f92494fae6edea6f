"""One user message in, one greedy reply out, over a server's `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from r3rag_jax.clients.endpoint import Endpoint
from r3rag_jax.errors import UserError


class ServedChat:
    """A model on an OpenAI-compatible server."""

    is_collective = False  # of several processes, one asks for all

    def __init__(self, endpoint: Endpoint, model: str, *, max_tokens: int, max_in_flight: int):
        """`model` is its name there; empty: the first that the server lists."""
        self._endpoint, self._model = endpoint, model
        self._max_tokens, self._max_in_flight = max_tokens, max_in_flight
        self._has_given_up = False

    @property
    def model(self) -> str:
        return self._model or self._endpoint.first_model

    @property
    def identity(self) -> str:
        """What a reply depends on beside the prompt: not where the model is served."""
        return self.model

    @property
    def place(self) -> str:
        """Where it is, for errors."""
        return self._endpoint.url

    def reply_all(self, prompts: Sequence[str]) -> Iterator[tuple[int, str | UserError]]:
        """Place of each prompt and its reply, or why there is none, as they come."""
        self._has_given_up = False
        with ThreadPoolExecutor(self._max_in_flight) as pool, self._endpoint.session():
            futures = {pool.submit(self._reply, prompt): place for place, prompt in enumerate(prompts)}
            try:
                for future in as_completed(futures):
                    if not future.cancelled():
                        yield futures[future], future.result()
                    if self._has_given_up:
                        _cancel(futures)
            finally:
                _cancel(futures)  # the caller has left

    def give_up(self) -> None:
        """Nothing more is asked and nothing asked again; `reply_all` still gives what is in flight."""
        self._has_given_up = True
        self._endpoint.give_up()

    def _reply(self, prompt: str) -> str | UserError:
        try:
            body = {
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0.0,
                "max_tokens": self._max_tokens,
            }
            reply = self._endpoint.call("/chat/completions", body)
            try:
                choice = reply["choices"][0]
                text, finish = choice["message"]["content"], choice.get("finish_reason")
            except (KeyError, IndexError, TypeError, AttributeError):
                text, finish = None, None
            if not isinstance(text, str):
                raise self._endpoint.malformed("/chat/completions", "choices with a message's content", reply)
            if finish == "length":
                raise self._endpoint.malformed("/chat/completions", f"in {self._max_tokens} tokens", reply)
        except UserError as error:
            return error
        return text


def _cancel(futures: Any) -> None:
    for future in futures:
        future.cancel()

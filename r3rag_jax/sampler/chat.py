"""One user message in, one reply out, greedy: over a server's `/v1/chat/completions`, or with a model of our own.

A judge reads with one of them. A message without a whole reply has an error in its place: nobody can take a failure, or
the half of a reply that a budget cut off ("Relevance: 0" of "Relevance: 0.85"), for what the model said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from r3rag_jax.endpoint import Endpoint
from r3rag_jax.errors import UserError
from r3rag_jax.models.cached_decoder import CachedDecoder
from r3rag_jax.sampler.engine import Context, Engine, complete_all
from r3rag_jax.text import Tokenizer, chat_frame

CHUNK = 32  # most tokens per row in one call on the device


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


class LocalChat:
    """A model of our own engine, whose stop tokens end a reply."""

    is_collective = True  # every process computes its share

    def __init__(
        self,
        engine: Engine,
        decoder: CachedDecoder,
        tokenizer: Tokenizer,
        *,
        model: str,
        identity: str,
        stop_ids: Sequence[int],
        max_tokens: int,
    ):
        """`model`: its name; `identity`: that of its weights, which replies depend on."""
        self._engine, self._decoder, self._tokenizer = engine, decoder, tokenizer
        self.model, self.identity = model, identity
        self._frame, self._max_tokens = chat_frame(tokenizer), max_tokens
        self._stop_ids = frozenset(stop_ids)
        engine.stop_at((), tuple(self._stop_ids))
        self._has_given_up = False

    @property
    def place(self) -> str:
        return "our own engine"

    def reply_all(self, prompts: Sequence[str]) -> Iterator[tuple[int, str | UserError]]:
        """See `ServedChat.reply_all`."""
        self._has_given_up = False
        prefix, suffix = self._frame
        room = self._engine.max_length - self._max_tokens
        places, contexts = [], []
        for place, prompt in enumerate(prompts):
            ids = [*prefix, *self._tokenizer.encode(prompt, allow_special=False), *suffix]
            if len(ids) > room:
                yield (
                    place,
                    UserError(f"a prompt may have {room} tokens (judge.max_length is short); got {len(ids)}"),
                )
                continue
            places.append(place)
            contexts.append(Context(ids, self._max_tokens))
        leave_at = max(1, self._engine.slots // 4)
        for number, ids in complete_all(self._engine, self._decoder, contexts, chunk=CHUNK, leave_at=leave_at):
            if ids[-1] in self._stop_ids:
                yield places[number], self._tokenizer.decode(ids[:-1], skip_special=True)
            else:
                yield places[number], UserError(f"{self.model} has not come to an end in {self._max_tokens} tokens")
            if self._has_given_up:
                return

    def give_up(self) -> None:
        """See `ServedChat.give_up`; what is in flight here is no reply yet."""
        self._has_given_up = True

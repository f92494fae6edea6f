"""One user message in, one greedy reply out: what a judge needs of a chat model, and the client of a served one.

A message without a whole reply yields an error: neither a failure nor the half of a reply that the token budget cut off
("Relevance: 0" of "Relevance: 0.85") can be taken for what the model said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from r3rag_jax.clients.endpoint import Endpoint
from r3rag_jax.errors import UserError

PATH = "/chat/completions"


class Chat(Protocol):
    """A chat model: `ChatClient`, or `EngineChat` of the sampler."""

    @property
    def is_collective(self) -> bool:
        """Whether all processes must call it together; otherwise one process calls it for all."""
        ...

    @property
    def model(self) -> str:
        """The model's name."""
        ...

    @property
    def identity(self) -> str:
        """What a reply depends on besides the prompt."""
        ...

    @property
    def location(self) -> str:
        """Where the model runs, for error messages."""
        ...

    def reply_all(self, prompts: Sequence[str]) -> Iterator[tuple[int, str | UserError]]:
        """Yields the index of each prompt and its reply, or why there is none, in the order of arrival."""
        ...

    def give_up(self) -> None:
        """Start no further replies of the current `reply_all`."""
        ...


class ChatClient:
    """A model on an OpenAI-compatible server, over `/v1/chat/completions`."""

    is_collective = False

    def __init__(self, endpoint: Endpoint, *, max_tokens: int):
        """`max_tokens`: budget of a reply; a longer one is an error."""
        self._endpoint, self._max_tokens = endpoint, max_tokens

    @property
    def model(self) -> str:
        return self._endpoint.model

    @property
    def identity(self) -> str:
        return self.model  # wherever it is served

    @property
    def location(self) -> str:
        return self._endpoint.url

    def reply_all(self, prompts: Sequence[str]) -> Iterator[tuple[int, str | UserError]]:
        """See `Chat.reply_all`; requests in flight when the client gives up still yield their replies."""
        return self._endpoint.call_all(self._reply, prompts)

    def give_up(self) -> None:
        self._endpoint.give_up()

    def _reply(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": self._max_tokens,
        }
        reply = self._endpoint.call(PATH, body)
        text, finish = read_message(self._endpoint, reply)
        if finish == "length":
            raise self._endpoint.malformed(PATH, f"in {self._max_tokens} tokens", reply)
        return text


def read_message(endpoint: Endpoint, reply: Any) -> tuple[str, Any]:
    """The text of a reply's first choice, and why it ended; None where the server does not say.

    Raises:
        UserError: the reply holds no text; as `Endpoint.malformed`.
    """
    try:
        choice = reply["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        text, finish = None, None
    if not isinstance(text, str):
        raise endpoint.malformed(PATH, "choices with a message's content", reply)
    return text, finish

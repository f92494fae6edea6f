"""A completion that the server streams: its text as it comes, and all of it as the reply that is not streamed.

The server sends events of OpenAI's form, a `data:` line of JSON each, of which every one holds a piece of text, and of
ids and log-probabilities where the server tells them. A server that ignores `stream` sends one JSON object.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from r3rag_jax.json_text import parse_json

FIELD, DONE = b"data:", b"[DONE]"
LISTS = ("tokens", "token_logprobs", "content")  # of `logprobs`


class StreamedReply:
    """Reads one reply, which may have to be requested several times."""

    def __init__(self, on_text: Callable[[str], None]):
        """`on_text`: called with the text so far, whenever more of it has come; what it raises ends the exchange."""
        self._on_text = on_text
        self.restart()

    def restart(self) -> None:
        """The request is sent, again."""
        self._rest, self._text = b"", ""

    def feed(self, chunk: bytes) -> None:
        """More bytes have come. What is malformed is left to `join`."""
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        before = self._text
        with contextlib.suppress(ValueError):
            for event in _events(lines):
                with contextlib.suppress(KeyError, IndexError, TypeError):
                    self._text += event["choices"][0]["text"]
        if self._text != before:
            self._on_text(self._text)

    def join(self, content: bytes) -> Any:
        """The whole reply as a server that does not stream would have sent it.

        Raises:
            ValueError: an event is no JSON, or there is none.
        """
        if content.lstrip().startswith(b"{"):
            return parse_json(content)
        events = list(_events(content.split(b"\n")))
        if not events:
            raise ValueError("no event")
        return _joined(events)


def _events(lines: Iterable[bytes]) -> Iterator[Any]:
    """The JSON values of the lines that hold one."""
    for line in lines:
        field, value = line[: len(FIELD)], line[len(FIELD) :].strip()
        if field == FIELD and value != DONE:
            yield parse_json(value)


def _joined(events: list[Any]) -> Any:
    """One reply of all events; the last of them, such as an error, where one has no choice."""
    whole: dict[str, Any] = {"text": "", "finish_reason": None}
    usage = None
    for event in events:
        usage = event.get("usage") or usage if isinstance(event, dict) else usage
        try:
            choices = event["choices"]
            if choices:
                _add(whole, choices[0])
        except (KeyError, IndexError, TypeError, AttributeError):
            return event
    return {"choices": [whole]} | ({"usage": usage} if usage else {})


def _add(whole: dict[str, Any], choice: dict[str, Any]) -> None:
    whole["text"] += choice["text"]
    for name in ("finish_reason", "stop_reason", "matched_stop"):
        if choice.get(name) is not None:
            whole[name] = choice[name]
    if choice.get("token_ids") is not None:
        whole["token_ids"] = whole.get("token_ids", []) + choice["token_ids"]
    logprobs = choice.get("logprobs") or {}
    for name in LISTS:
        if logprobs.get(name):
            joined = whole.setdefault("logprobs", {})
            joined[name] = joined.get(name, []) + logprobs[name]

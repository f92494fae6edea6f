"""One user message in, one reply out, greedy: over a server's `/v1/chat/completions`, or with a model of our own.

A judge reads with one of them. A message without a whole reply has an error in its place: nobody can take a failure, or
the half of a reply that a budget cut off ("Relevance: 0" of "Relevance: 0.85"), for what the model said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from r3rag_jax.errors import UserError
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.engine import Engine, complete_all
from r3rag_jax.text.tokenizer import Tokenizer, chat_frame
from r3rag_jax.types import Context

CHUNK = 32  # most tokens per row in one call on the device


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

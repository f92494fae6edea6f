"""A chat model that runs on the sampler's engine; it implements the `Chat` protocol of `clients/chat.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from r3rag_jax.errors import UserError
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.engine import Engine, complete_all
from r3rag_jax.sampler.stops import StopTokens
from r3rag_jax.text.message_frame import MessageFrame
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Context

CHUNK = 32  # maximum tokens per row in one decode call


class EngineChat:
    """A model on the run's own devices. It decodes greedily until a stop token or `max_tokens`."""

    is_collective = True  # all processes must call: each computes its own rows

    def __init__(
        self,
        engine: Engine,
        decoder: CachedDecoder,
        tokenizer: Tokenizer,
        *,
        model: str,
        identity: str,
        max_tokens: int,
    ):
        """Serve `decoder` as a chat model.

        Args:
            model: the model's name, for messages.
            identity: identifies the weights, so that cached replies of other weights are not reused.
            max_tokens: longest reply; a longer one is an error.
        """
        self._engine, self._decoder, self._tokenizer = engine, decoder, tokenizer
        self.model, self.identity = model, identity
        self._frame, self._max_tokens = MessageFrame.chat(tokenizer), max_tokens
        self._stops = StopTokens(stop_ids=tokenizer.end_ids)
        self._has_given_up = False

    @property
    def location(self) -> str:
        return "our own engine"

    def reply_all(self, prompts: Sequence[str]) -> Iterator[tuple[int, str | UserError]]:
        """See `Chat.reply_all`."""
        self._has_given_up = False
        max_prompt_tokens = self._engine.max_length - self._max_tokens
        indices, contexts = [], []
        for index, prompt in enumerate(prompts):
            ids = self._frame.ids(prompt)
            if len(ids) > max_prompt_tokens:
                yield (
                    index,
                    UserError(
                        f"a prompt may have {max_prompt_tokens} tokens (raise judge.local.max_length); got {len(ids)}"
                    ),
                )
                continue
            indices.append(index)
            contexts.append(Context(ids, self._max_tokens))
        leave_at = max(1, self._engine.slots // 4)
        for row, ids in complete_all(
            self._engine, self._decoder, contexts, self._stops, chunk=CHUNK, leave_at=leave_at
        ):
            if len(said := self._tokenizer.without_end(ids)) < len(ids):
                yield indices[row], self._tokenizer.decode(said, skip_special=True)
            else:
                yield (
                    indices[row],
                    UserError(
                        f"the reply of {self.model} must end within {self._max_tokens} tokens; got no stop token"
                    ),
                )
            if self._has_given_up:
                return

    def give_up(self) -> None:
        """See `Chat.give_up`; unfinished replies are dropped."""
        self._has_given_up = True

"""Prompts that end with a text from outside, by itself or as a user message in the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from r3rag_jax.text.tokenizer import Tokenizer


class MessageFrame:
    """What stands before and after a text; frame and text are encoded as one, and the text spells no special token."""

    def __init__(self, tokenizer: Tokenizer, before: str = "", after: str = "", *, is_chat: bool = False):
        """`is_chat`: the frame is the chat template's, which may strip spaces from the ends of a content."""
        self._tokenizer, self._before, self._after, self._is_chat = tokenizer, before, after, is_chat

    @classmethod
    def chat(cls, tokenizer: Tokenizer, turns: Sequence[Mapping[str, str]] = ()) -> MessageFrame:
        """The frame of a user message that follows `turns`; an assistant turn is opened after it.

        Raises:
            UserError: there is no chat template, or it does not show the content once and unchanged.
        """
        return cls(tokenizer, *tokenizer.frame_of_user_message(turns), is_chat=True)

    def ids(self, text: str, tail: str = "") -> list[int]:
        """Return the ids of the prompt; `tail`, another text from outside, follows it."""
        return self._tokenizer.encode_pieces([self._before, self._content(text), self._after, tail])

    def cut(self, text: str, max_tokens: int, tail: str = "") -> list[int]:
        """As `ids`, with the beginning of the text cut off so that at most `max_tokens` remain.

        Returns `[]` if frame and tail alone have as many.
        """
        ids = self.ids(text, tail)
        if len(ids) <= max_tokens:
            return ids
        tokenizer = self._tokenizer
        before = tokenizer.encode(self._before)
        after = tokenizer.encode_pieces([self._after, tail], continues=True)
        room = max_tokens - len(before) - len(after)
        if room < 1:
            return []
        middle = tokenizer.encode(self._content(text), allow_special=False, continues=bool(before))
        return [*before, *middle[-room:], *after]

    def _content(self, text: str) -> str:
        return self._tokenizer.strip_content(text) if self._is_chat else text

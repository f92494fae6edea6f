"""Prompts that a model continues: examples, the question with its passages, and what the reply holds so far.

A base model gets plain text to continue. A chat model gets an instruction in its chat template, after examples as
earlier turns, and continues its own reply:

    plain   {examples}{passages}Question: {question}\\n{cue}{reply}
    chat    … user: Documents:\\n{passages}\\n{instruction}\\nQuestion: {question}   assistant: {cue, if said}{reply}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from r3rag_jax.rollout.env import StopRule
from r3rag_jax.text.message_frame import MessageFrame
from r3rag_jax.text.prompts import listed
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Passage

Shown = tuple[Sequence[Passage], str]  # the passages of a prompt, and the reply so far


@dataclasses.dataclass(frozen=True)
class Example:
    """A worked question."""

    documents: tuple[str, ...]
    question: str
    reply: str  # what follows the cue and a space


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How a baseline asks.

    Fields:
        instruction: of a chat model.
        cue: what the reply begins after, in plain text.
        examples: shown before the question.
        says_cue: whether the reply of a chat model begins with the cue, too.
    """

    instruction: str
    cue: str
    examples: tuple[Example, ...]
    says_cue: bool = False

    def plain(self, question: str, documents: Sequence[Passage | str], reply: str) -> str:
        """The question in plain text, without examples; `reply` begins with a space, or is empty."""
        return f"{listed(documents)}Question: {question}\n{self.cue}{reply}"

    def message(self, question: str, documents: Sequence[Passage | str]) -> str:
        """The user message of a question."""
        given = f"Documents:\n{listed(documents)}\n" if documents else ""
        return f"{given}{self.instruction}\nQuestion: {question}"

    def tail(self, reply: str) -> str:
        """What a chat model has replied so far."""
        return f"{self.cue}{reply}" if self.says_cue else reply.lstrip(" ")


class PromptWriter:
    """Writes the prompts of one style."""

    def __init__(self, style: PromptStyle, tokenizer: Tokenizer, max_length: int, *, is_chat: bool):
        """Render the fixed part of the prompt.

        Args:
            max_length: maximum number of tokens of a prompt and its completion together.
            is_chat: use an instruction in the model's chat template instead of plain text to continue.
        """
        self.tokenizer, self._style, self._max_length, self.is_chat = tokenizer, style, max_length, is_chat
        self._examples = "".join(f"{style.plain(e.question, e.documents, f' {e.reply}')}\n\n" for e in style.examples)
        turns = [
            {"role": role, "content": content}
            for e in style.examples
            for role, content in (
                ("user", style.message(e.question, e.documents)),
                ("assistant", style.tail(f" {e.reply}")),
            )
        ]
        self._frame = MessageFrame.chat(tokenizer, turns) if is_chat else MessageFrame(tokenizer)

    def num_tokens(self, question: str, budget: int) -> int:
        """The number of tokens that the first prompt, without passages, and its completion have at least.

        The examples of plain text do not count: a prompt that is too long loses them.
        """
        return len(self._without_examples(question, (), "")) + budget

    def ids(self, question: str, budget: int, *shown: Shown) -> list[int]:
        """Return the ids of a prompt that leaves `budget` tokens free, or `[]` if there is none.

        Args:
            shown: what the prompt shows, in the order of preference; the first that fits is taken. If none fits, the
                examples of plain text are cut from their beginning, to show the last.
        """
        max_tokens = self._max_length - budget
        for passages, reply in shown:
            ids = self._ids(question, passages, reply)
            if len(ids) <= max_tokens:
                return ids
        passages, reply = shown[-1]
        if self.is_chat or len(self._without_examples(question, passages, reply)) > max_tokens:
            return []
        return self._frame.cut(self._examples + self._style.plain(question, passages, reply), max_tokens)

    def _ids(self, question: str, passages: Sequence[Passage], reply: str) -> list[int]:
        if self.is_chat:
            return self._frame.ids(self._style.message(question, passages), self._style.tail(reply))
        return self._frame.ids(self._examples + self._style.plain(question, passages, reply))

    def _without_examples(self, question: str, passages: Sequence[Passage], reply: str) -> list[int]:
        if self.is_chat:
            return self._ids(question, passages, reply)
        return self._frame.ids(self._style.plain(question, passages, reply))


def fewer_passages(passages: Sequence[Passage], reply: str, *, oldest_first: bool = False) -> Iterable[Shown]:
    """All passages, then one fewer each time, down to none: the last of them goes first, or with `oldest_first` the
    first.
    """
    for count in range(len(passages) + 1):
        yield (passages[count:] if oldest_first else passages[: len(passages) - count]), reply


def text_stops(tokenizer: Tokenizer, *texts: str, tokens: Sequence[str] = ()) -> StopRule:
    """Return what ends a completion: the end of the turn, or one of the texts, wherever in a token it ends.

    Args:
        tokens: texts that end a completion only where they are single tokens.
    """
    pieces = (tokenizer.encode(text, continues=True) for text in (*tokens, *texts))
    single_tokens = {ids[0] for ids in pieces if len(ids) == 1}
    stop_ids = dict.fromkeys((*single_tokens, *tokenizer.end_ids, tokenizer.pad_id))
    return StopRule(stop_ids=tuple(stop_ids), stop_strings=texts)


def line_stops(tokenizer: Tokenizer, *others: str) -> StopRule:
    """Return what ends a line of text: a newline, one of the `others`, or the end of the turn."""
    return text_stops(tokenizer, "\n", *others, tokens=["\n\n"])

"""One line of answer from a prompt: what closed book and one-shot RAG share.

The prompt is plain reading ("Question: …\\nAnswer:") for a base model or, with `is_chat`, an instruction in the model's
chat template, after three examples of short answers. A prompt that exceeds the context loses its last passages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

from r3rag_jax.rollout.env import Done, StopRule
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.text.prompts import example_turns, instruction_prompt, reading_prompt
from r3rag_jax.text.tokenizer import Tokenizer, chat_frame
from r3rag_jax.types import Completion, Context, Passage, Question, Status, Step, Trajectory

MAX_ANSWER_TOKENS = 24


def line_stops(tokenizer: Tokenizer, *others: str) -> StopRule:
    """Return what ends a line of text: a newline, one of the `others`, or the end of the turn."""
    texts = ("\n", "\n\n", *others)
    single_tokens = {ids[0] for text in texts if len(ids := tokenizer.encode(text)) == 1}
    stop_ids = dict.fromkeys((*single_tokens, *tokenizer.end_ids, tokenizer.pad_id))
    return StopRule(stop_ids=tuple(stop_ids), stop_strings=("\n", *others))


Encode = Callable[[str], list[int]]


def encoder(tokenizer: Tokenizer, *, is_chat: bool) -> Encode:
    """Return what encodes a prompt: as the content of a user message, or as plain text to continue."""
    return tokenizer.encode_content if is_chat else functools.partial(tokenizer.encode, allow_special=False)


def first_that_fits(encode: Encode, prompts: Iterable[str], max_tokens: int) -> list[int]:
    """Return the ids of the first prompt with at most `max_tokens` (> 0), or the last ids of the last prompt."""
    ids: list[int] = []
    for prompt in prompts:
        ids = encode(prompt)
        if len(ids) <= max_tokens:
            break
    return ids[-max_tokens:]


class LineReader:
    """Writes the prompt of a question, and reads the line that completes it."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, *, is_chat: bool, with_passages: bool):
        """Render the fixed part of the prompt.

        Args:
            max_length: maximum number of tokens of prompt and answer together.
            with_passages: whether the examples of a chat prompt show passages.
        """
        self._tokenizer, self._encode = tokenizer, encoder(tokenizer, is_chat=is_chat)
        self._prompt_of = instruction_prompt if is_chat else reading_prompt
        self._prefix, self._suffix = chat_frame(tokenizer, example_turns(with_passages)) if is_chat else ([], [])
        self._max_prompt = max_length - MAX_ANSWER_TOKENS - len(self._prefix) - len(self._suffix)

    def num_tokens(self, question: Question) -> int:
        """The number of tokens of the prompt without passages and of an answer."""
        num_prompt = len(self._encode(self._prompt_of(question.question, ())))
        return len(self._prefix) + num_prompt + len(self._suffix) + MAX_ANSWER_TOKENS

    def context(self, request: RolloutRequest, passages: Sequence[Passage]) -> Context:
        """Return the prompt that asks for the answer."""
        question = request.question.question
        prompts = (self._prompt_of(question, passages[:count]) for count in range(len(passages), -1, -1))
        ids = [*self._prefix, *first_that_fits(self._encode, prompts, self._max_prompt), *self._suffix]
        key = request.key(0) if request.temperature > 0 else None
        return Context(ids, MAX_ANSWER_TOKENS, request.temperature, key)

    def done(self, request: RolloutRequest, passages: Sequence[Passage], completion: Completion) -> Done:
        """Return the trajectory: a retrieval step, if it found passages, and an answer step, if a line was written."""
        text = self._tokenizer.decode(self._tokenizer.without_end(completion.ids), skip_special=True)
        line = text.partition("\n")[0].strip()  # a token may hold more than the newline
        question = request.question
        steps = [Step("", query=question.question, passages=tuple(passages))] if passages else []
        if line:
            steps.append(Step("", answer=line))
        num_tokens = len(completion.ids) if line else None
        status = Status.ANSWERED if line else Status.NO_ANSWER
        return Done(
            Trajectory(question, tuple(steps), status, sample_index=request.sample_index, num_tokens=num_tokens)
        )

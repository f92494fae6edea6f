"""One line of answer from a prompt: what closed book and naive RAG share.

The prompt is plain reading ("Question: …\\nAnswer:") for a base model or, with `is_chat`, an instruction in the model's
chat template, after three examples of short answers. A prompt that exceeds the context loses its last passages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from r3rag_jax.rollout.env import Done
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.text.message_frame import MessageFrame
from r3rag_jax.text.prompts import example_turns, instruction_prompt, reading_prompt
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion, Context, Passage, Question, Status, Step, Trajectory


def first_that_fits(frame: MessageFrame, texts: Iterable[str], max_tokens: int, tail: str = "") -> list[int]:
    """Return the ids of the first prompt with at most `max_tokens`, or of the last one with its text cut to that.

    Returns `[]` if not even the frame fits.
    """
    text = ""
    for text in texts:
        if len(ids := frame.ids(text, tail)) <= max_tokens:
            return ids
    return frame.cut(text, max_tokens, tail)


class LineReader:
    """Writes the prompt of a question, and reads the line that completes it."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, max_tokens: int, *, is_chat: bool, with_passages: bool):
        """Render the fixed part of the prompt.

        Args:
            max_length: maximum number of tokens of prompt and answer together.
            max_tokens: maximum number of tokens of an answer.
            with_passages: whether the examples of a chat prompt show passages.
        """
        self._tokenizer, self._max_tokens, self._max_prompt = tokenizer, max_tokens, max_length - max_tokens
        self._prompt_of = instruction_prompt if is_chat else reading_prompt
        turns = example_turns(with_passages)
        self._frame = MessageFrame.chat(tokenizer, turns) if is_chat else MessageFrame(tokenizer)

    def num_tokens(self, question: Question) -> int:
        """The number of tokens of the prompt without passages and of an answer."""
        return len(self._frame.ids(self._prompt_of(question.question, ()))) + self._max_tokens

    def context(self, request: RolloutRequest, passages: Sequence[Passage]) -> Context:
        """Return the prompt that asks for the answer."""
        question = request.question.question
        prompts = (self._prompt_of(question, passages[:count]) for count in range(len(passages), -1, -1))
        ids = first_that_fits(self._frame, prompts, self._max_prompt)
        key = request.key(0) if request.temperature > 0 else None
        return Context(ids, self._max_tokens, request.temperature, key)

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

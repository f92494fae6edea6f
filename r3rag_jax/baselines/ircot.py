"""IRCoT (Trivedi et al., arXiv 2212.10509): a chain of thought whose sentences are the queries.

The question is the first query. Then the model alternates between writing one sentence of its chain, given all passages
found so far, and retrieving with that sentence as the query. It ends when a sentence holds "So the answer is:"; after
`max_sentences` without one, the prompt is continued by these words, so that the model must answer.
As in FlashRAG, a sentence ends at the first full stop or newline, so an answer with a full stop inside is cut there.
The prompts are our own; see `text/prompts.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from r3rag_jax.baselines.reading import MAX_ANSWER_TOKENS, first_that_fits
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.retrieval.selection import select_passages
from r3rag_jax.rollout.env import Done, Search
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.text.message_frame import MessageFrame
from r3rag_jax.text.prompts import (
    ANSWER_MARK,
    chain_example_turns,
    chain_frame,
    chain_instruction_prompt,
    chain_reading_prompt,
)
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion, Context, Passage, Question, Status, Step, Trajectory

MAX_SENTENCES = 4
MAX_SENTENCE_TOKENS = 64


class ChainWriter:
    """Writes the prompt that a chain of thought continues."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, *, is_chat: bool):
        """Render the fixed part of the prompt.

        Args:
            max_length: maximum number of tokens of a prompt and its completion together.
            is_chat: use an instruction in the model's chat template instead of plain text to continue.
        """
        self.tokenizer, self._max_length, self._is_chat = tokenizer, max_length, is_chat
        self._frame = MessageFrame.chat(tokenizer, chain_example_turns()) if is_chat else MessageFrame(tokenizer)

    def num_tokens(self, question: Question) -> int:
        """The number of tokens that the first prompt has at least, and of a sentence."""
        return self._num_least(question.question, ()) + MAX_SENTENCE_TOKENS

    def _num_least(self, question: str, sentences: Sequence[str]) -> int:
        """The number of tokens that no prompt lacks; the examples of plain text are not part of it."""
        if self._is_chat:
            return len(self._frame.ids(chain_instruction_prompt(question, ()), " ".join(sentences)))
        return len(self._frame.ids(chain_frame(question, (), sentences)))

    def ids(self, question: str, passages: Sequence[Passage], sentences: Sequence[str], budget: int) -> list[int]:
        """Return the ids of a prompt that leaves `budget` tokens free, or `[]` if not even question and chain do.

        A prompt that is too long loses its oldest passages first, since the chain already says what was in them, then
        the examples with which plain text begins.
        """
        max_tokens = self._max_length - budget
        if self._num_least(question, sentences) > max_tokens:
            return []
        chain = " ".join(sentences) if self._is_chat else ""
        shown = (passages[number:] for number in range(len(passages) + 1))
        prompts = (
            chain_instruction_prompt(question, some)
            if self._is_chat
            else chain_reading_prompt(question, some, sentences)
            for some in shown
        )
        return first_that_fits(self._frame, prompts, max_tokens, chain)


class IRCoTEnv:
    """One question, answered at the end of a chain of thought that retrieves."""

    def __init__(
        self,
        request: RolloutRequest,
        *,
        writer: ChainWriter,
        top_k: int,
        max_passages: int,
        max_sentences: int = MAX_SENTENCES,
    ):
        """Create the Env of a request.

        Args:
            top_k: maximum number of new passages per retrieval.
            max_passages: maximum number of passages in all.
            max_sentences: maximum number of sentences in the chain; the answer does not count.
        """
        self._request, self._writer = request, writer
        self._top_k, self._max_passages, self._max_sentences = top_k, max_passages, max_sentences
        self._steps = [Step("", query=request.question.question)]
        self._passages: dict[str, Passage] = {}  # by id, oldest first
        self._sentences: list[str] = []
        self._is_answering = False  # the prompt ends with ANSWER_MARK
        self._num_sampled = 0  # tokens

    def start(self) -> Search:
        """See `Env.start`."""
        return self._search()

    def observe(self, hits: Sequence[Hit]) -> Context | Done:
        """See `Env.observe`."""
        found = select_passages(hits, self._passages, self._top_k, max_passages=self._max_passages)
        self._passages |= {passage.id: passage for passage in found}
        self._steps[-1] = dataclasses.replace(self._steps[-1], passages=found)
        return self._ask_for_answer() if len(self._sentences) >= self._max_sentences else self._context()

    def step(self, completion: Completion) -> Context | Search | Done:
        """See `Env.step`."""
        self._num_sampled += len(completion.ids)
        tokenizer = self._writer.tokenizer
        text = tokenizer.decode(tokenizer.without_end(completion.ids), skip_special=True)
        line = text.partition("\n")[0].strip()
        if self._is_answering:
            return self._done("", line)
        thought, mark, answer = line.partition(ANSWER_MARK)
        if mark:
            return self._done(thought.strip(), answer)
        if not line.strip("."):
            return self._ask_for_answer()  # the model has ended its chain
        sentence = line if line.endswith((".", "!", "?")) else f"{line}."
        self._sentences.append(sentence)
        self._steps.append(Step(sentence, query=sentence))
        return self._search()

    def _search(self) -> Search:
        return Search(self._steps[-1].query or "", self._top_k + len(self._passages))

    def _ask_for_answer(self) -> Context | Done:
        self._is_answering = True
        return self._context()

    def _context(self) -> Context | Done:
        budget = MAX_ANSWER_TOKENS if self._is_answering else MAX_SENTENCE_TOKENS
        sentences = [*self._sentences, ANSWER_MARK] if self._is_answering else self._sentences
        request = self._request
        ids = self._writer.ids(request.question.question, [*self._passages.values()], sentences, budget)
        if not ids:
            return self._done("", "")
        key = request.key(len(sentences)) if request.temperature > 0 else None
        return Context(ids, budget, request.temperature, key)

    def _done(self, thought: str, answer: str) -> Done:
        if answer := answer.strip().rstrip(".").strip():
            self._steps.append(Step(thought, answer=answer))
        status = Status.ANSWERED if answer else Status.NO_ANSWER
        request, steps = self._request, tuple(self._steps)
        return Done(Trajectory(request.question, steps, status, (), request.sample_index, self._num_sampled))

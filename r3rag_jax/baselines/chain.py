"""A chain of thought that ends with "So the answer is:": what CoT, RAG + CoT, IRCoT, ITER-RETGEN and FLARE share.

A chain that ends without these words is continued by them, so that the model must answer. The words are those of
IRCoT's prompts (arXiv 2212.10509); the instruction and the examples are our own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from r3rag_jax.baselines.attempt import Attempt
from r3rag_jax.baselines.demonstrations import DEMONSTRATIONS
from r3rag_jax.baselines.prompting import Example, PromptStyle, PromptWriter, fewer_passages, line_stops, text_stops
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.rollout.env import Done, Search, StopRule, Transition
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion, Context, Passage

ANSWER_MARK = "So the answer is:"
INSTRUCTION = (
    "Answer the question step by step. Write short sentences, each with one fact that the question needs. "
    f'End with "{ANSWER_MARK}" and a name, a number or a few words only.'
)


def chain_style(*, with_documents: bool) -> PromptStyle:
    """The style of a chain of thought; `with_documents`: the examples show the documents that their facts are of."""
    examples = tuple(
        Example(
            demo.documents if with_documents else (),
            demo.question,
            f"{' '.join(hop.fact for hop in demo.hops)} {ANSWER_MARK} {demo.answer}",
        )
        for demo in DEMONSTRATIONS
    )
    return PromptStyle(INSTRUCTION, "Reasoning:", examples)


def chain_stops(tokenizer: Tokenizer, *, is_chat: bool) -> StopRule:
    """Return what ends a whole chain: a base model's is one line, a chat model's is its turn."""
    return text_stops(tokenizer) if is_chat else line_stops(tokenizer)


def first_line(text: str) -> str:
    """The first line of a text."""
    return text.strip().partition("\n")[0].strip()


@dataclasses.dataclass(frozen=True)
class ChainSettings:
    """What a baseline with a chain of thought is made of.

    Fields:
        writer: writes prompts of `chain_style`.
        max_tokens: budget of a completion.
        max_answer_tokens: budget of an answer that is asked for.
        top_k: passages per search.
        keeps_newest: whether a prompt that is too long loses its oldest passages first, and not the last ones.
    """

    writer: PromptWriter
    max_tokens: int
    max_answer_tokens: int
    top_k: int = 0
    keeps_newest: bool = False

    def num_tokens(self, question: str) -> int:
        """See `EnvFactory.num_tokens`."""
        return self.writer.num_tokens(question, self.max_tokens)


class ChainEnv:
    """An attempt that writes a chain of thought; what is asked when is up to its subclasses."""

    def __init__(self, request: RolloutRequest, settings: ChainSettings):
        self._settings = settings
        self._attempt = Attempt(request, settings.writer.tokenizer)
        self._passages: Sequence[Passage] = ()  # that the next prompt shows
        self._chain = ""  # what has been written of it; each piece begins with a space
        self._is_answering = False  # the prompt ends with ANSWER_MARK

    def _context(self) -> Context | Done:
        """Go on with the chain, or with the answer."""
        settings, chain = self._settings, self._chain
        budget = settings.max_answer_tokens if self._is_answering else settings.max_tokens
        reply = f"{chain} {ANSWER_MARK}" if self._is_answering else chain
        shown = fewer_passages(self._passages, reply, oldest_first=settings.keeps_newest)
        ids = settings.writer.ids(self._attempt.question, budget, *shown)
        return self._attempt.context(ids, budget)

    def _ask_for_answer(self) -> Context | Done:
        self._is_answering = True
        return self._context()

    def _finish(self, text: str, thought: str = "") -> Done | None:
        """End with the answer that a text gives; None if it gives none.

        Args:
            thought: what the last step has thought before this text.
        """
        if self._is_answering:
            return self._attempt.done(thought, first_line(text))
        before, mark, answer = text.partition(ANSWER_MARK)
        return self._attempt.done(f"{thought} {before.strip()}", first_line(answer)) if mark else None


class SearchingChainEnv(ChainEnv):
    """An attempt whose first search is for the question; what a search brings replaces what the last one brought."""

    def start(self) -> Search:
        """See `Env.start`."""
        return self._attempt.search(self._attempt.question, self._settings.top_k)

    def observe(self, hits: Sequence[Hit]) -> Context | Done:
        """See `Env.observe`."""
        self._passages = [hit.passage for hit in hits[: self._settings.top_k]]
        self._attempt.observe(self._passages)
        return self._context()


class WholeChainEnv(ChainEnv):
    """An attempt whose chain is one completion."""

    def step(self, completion: Completion) -> Transition:
        """See `Env.step`."""
        text = self._attempt.read(completion)
        if done := self._finish(text, thought=self._chain):
            return done
        self._chain = f" {text.strip()}" if text.strip() else ""
        return self._ask_for_answer()

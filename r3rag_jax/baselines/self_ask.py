"""Self-Ask (Press et al., arXiv 2210.03350) with a retriever: the model's own follow-up questions are the queries.

    Are follow up questions needed here: Yes.
    Follow up: …                     ─► searched for; the passages are put before the question
    Intermediate answer: …
    So the final answer is: …

The words are those of the paper. As in FlashRAG, the model reads an intermediate answer from the passages of the last
follow-up question, where the paper's search engine gives the answer itself. It ends at "So the final answer is:"; after
`max_follow_ups` questions (5, FlashRAG's constant), or where the model writes neither, the prompt is continued by these
words. The examples are our own.
"""

from __future__ import annotations

from collections.abc import Sequence

from r3rag_jax.baselines.attempt import Attempt
from r3rag_jax.baselines.chain import ChainSettings, first_line
from r3rag_jax.baselines.demonstrations import DEMONSTRATIONS
from r3rag_jax.baselines.prompting import Example, PromptStyle, fewer_passages, text_stops
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.rollout.env import Done, Search, StopRule
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion, Context, Passage

FOLLOW_UP, INTERMEDIATE, FINAL = "Follow up:", "Intermediate answer:", "So the final answer is:"
STYLE = PromptStyle(
    "Answer the question. If it needs facts that you must look up first, ask for them one at a time: write "
    f'"{FOLLOW_UP}" and a short question, then "{INTERMEDIATE}" and what the documents say. '
    f'End with "{FINAL}" and a name, a number or a few words only.',
    "Are follow up questions needed here:",
    tuple(
        Example(
            demo.documents,
            demo.question,
            "Yes.\n"
            + "".join(f"{FOLLOW_UP} {hop.question}\n{INTERMEDIATE} {hop.answer}\n" for hop in demo.hops)
            + f"{FINAL} {demo.answer}",
        )
        for demo in DEMONSTRATIONS
    ),
    says_cue=True,
)


def self_ask_stops(tokenizer: Tokenizer) -> StopRule:
    """Return what ends a completion: a follow-up question has been asked, or another question begins."""
    return text_stops(tokenizer, INTERMEDIATE, "\nQuestion:")


class SelfAskEnv:
    """One question, answered by way of follow-up questions."""

    def __init__(self, request: RolloutRequest, settings: ChainSettings, *, max_follow_ups: int):
        """Create the Env of a request.

        Args:
            settings: with a writer of STYLE.
            max_follow_ups: maximum number of follow-up questions, which are searches.
        """
        self._settings, self._num_left = settings, max_follow_ups
        self._attempt = Attempt(request, settings.writer.tokenizer)
        self._passages: Sequence[Passage] = ()  # of the last follow-up question
        self._reply = ""  # after the cue
        self._thought = ""  # what was written before an answer that is asked for
        self._is_answering = False  # the prompt ends with FINAL

    def start(self) -> Context | Done:
        """See `Env.start`."""
        return self._context()

    def step(self, completion: Completion) -> Context | Search | Done:
        """See `Env.step`."""
        text = self._attempt.read(completion)
        if self._is_answering:
            return self._attempt.done(self._thought, first_line(text))
        text = text.partition(INTERMEDIATE)[0].partition("\nQuestion:")[0]
        before, mark, answer = text.partition(FINAL)
        before, asks, question = before.partition(FOLLOW_UP)
        if mark and not asks:
            return self._attempt.done(before, first_line(answer))
        self._reply += f" {before.strip()}" if before.strip() else ""
        query = first_line(question)
        if not query or self._num_left == 0:
            self._thought = before.strip()
            return self._ask_for_answer()
        self._num_left -= 1
        self._reply += f"\n{FOLLOW_UP} {query}\n{INTERMEDIATE}"
        return self._attempt.search(query, self._settings.top_k, before.strip())

    def observe(self, hits: Sequence[Hit]) -> Context | Done:
        """See `Env.observe`."""
        self._passages = [hit.passage for hit in hits[: self._settings.top_k]]
        self._attempt.observe(self._passages)
        return self._context()

    def _ask_for_answer(self) -> Context | Done:
        self._is_answering = True
        self._reply += f"\n{FINAL}"
        return self._context()

    def _context(self) -> Context | Done:
        settings = self._settings
        budget = settings.max_answer_tokens if self._is_answering else settings.max_tokens
        shown = fewer_passages(self._passages, self._reply)
        return self._attempt.context(settings.writer.ids(self._attempt.question, budget, *shown), budget)

"""IRCoT (Trivedi et al., arXiv 2212.10509): a chain of thought whose sentences are the queries.

The question is the first query. Then the model alternates between writing one sentence of its chain, given all passages
found so far, and retrieving with that sentence as the query. It ends when a sentence holds "So the answer is:"; after
`max_sentences` without one, the prompt is continued by these words, so that the model must answer.

As in FlashRAG, a sentence ends at the first full stop or newline, so an answer with a full stop inside is cut there. A
search brings passages that the chain has not shown, at most `retrieval.max_passages` in all; a prompt that is too long
loses the oldest ones first, since the chain already says what was in them.

Eight sentences and 15 passages in all are the paper's limits, with two to eight passages a search; FlashRAG's default
is two sentences.
"""

from __future__ import annotations

from collections.abc import Sequence

from r3rag_jax.baselines.chain import ChainEnv, ChainSettings, first_line
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.retrieval.selection import select_passages
from r3rag_jax.rollout.env import Done, Search
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.types import Completion, Context, Passage

ENDS_OF_SENTENCES = (".", "!", "?")


def as_sentence(text: str) -> str:
    """The first line of a text, with a full stop if it lacks one; "" where there is nothing but full stops."""
    line = first_line(text)
    if not line.strip("."):
        return ""
    return line if line.endswith(ENDS_OF_SENTENCES) else f"{line}."


class IRCoTEnv(ChainEnv):
    """One question, answered at the end of a chain of thought that retrieves."""

    def __init__(self, request: RolloutRequest, settings: ChainSettings, *, max_passages: int, max_sentences: int):
        """Create the Env of a request.

        Args:
            settings: with the budget of a sentence.
            max_passages: maximum number of passages in all.
            max_sentences: maximum number of sentences in the chain; the answer does not count.
        """
        super().__init__(request, settings)
        self._max_passages, self._max_sentences = max_passages, max_sentences
        self._found: dict[str, Passage] = {}  # by id, oldest first
        self._num_sentences = 0

    def start(self) -> Search:
        """See `Env.start`."""
        return self._search(self._attempt.question)

    def observe(self, hits: Sequence[Hit]) -> Context | Done:
        """See `Env.observe`."""
        found = select_passages(hits, self._found, self._settings.top_k, max_passages=self._max_passages)
        self._attempt.observe(found)
        self._found |= {passage.id: passage for passage in found}
        self._passages = [*self._found.values()]
        return self._ask_for_answer() if self._num_sentences >= self._max_sentences else self._context()

    def step(self, completion: Completion) -> Context | Search | Done:
        """See `Env.step`."""
        text = self._attempt.read(completion)
        if done := self._finish(text):
            return done
        sentence = as_sentence(text)
        if not sentence:
            return self._ask_for_answer()  # the model has ended its chain
        self._chain += f" {sentence}"
        self._num_sentences += 1
        return self._search(sentence, sentence)

    def _search(self, query: str, analysis: str = "") -> Search:
        return self._attempt.search(query, self._settings.top_k + len(self._found), analysis)

"""FLARE (Jiang et al., arXiv 2305.06983, FLARE direct): retrieve when the next sentence is not sure.

The question is the first query. Then the model looks ahead by one sentence. If each of its tokens has at least the
probability `threshold`, the sentence is accepted. Otherwise the sentence is a query, without the tokens below
`mask_below`, and is written again over what it finds; what the model then writes is accepted as it is. A sentence of
which no token is left to ask for is accepted. Passages stay in the prompt until a search replaces them.

It ends when a sentence holds "So the answer is:"; after `max_tokens` of sentences, or where the model ends by itself,
the prompt is continued by these words. A sentence ends as in IRCoT.

The defaults are the released code's for 2WikiMultiHopQA, which retrieves two passages a search. FlashRAG's threshold is
0.2, for query and mask alike, and it does not search for the question. A backend must return the log-probabilities of
the sampled tokens; with `rollout.min_p` and its like the engine's are those of the truncated distribution.
"""

from __future__ import annotations

import numpy as np

from r3rag_jax.baselines.chain import ChainSettings, SearchingChainEnv, first_line
from r3rag_jax.baselines.ircot import as_sentence
from r3rag_jax.errors import UserError
from r3rag_jax.rollout.env import Done, Search
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion, Context

NEEDS_LOGPROBS = (
    "the baseline flare needs the log-probability of each sampled token; the inference server has returned none: it "
    "must answer `logprobs` in its completions (vLLM and SGLang do)"
)


def unsure_query(tokenizer: Tokenizer, completion: Completion, threshold: float, mask_below: float) -> str:
    """The query of a sentence, "" if it needs none: each token has at least the probability `threshold`.

    Args:
        mask_below: tokens below this probability are left out of the query.

    Raises:
        UserError: the completion has no log-probabilities.
    """
    if completion.logprobs is None:
        raise UserError(NEEDS_LOGPROBS)
    ids = tokenizer.without_end(completion.ids)
    probabilities = np.exp(completion.logprobs[: len(ids)])  # NaN: of a stop that the server left out
    if not np.any(probabilities < threshold):
        return ""
    kept = [id for id, p in zip(ids, probabilities, strict=True) if not p < mask_below]
    return first_line(tokenizer.decode(kept, skip_special=True)).strip(" .")


class FLAREEnv(SearchingChainEnv):
    """One question, answered at the end of a chain of thought whose unsure sentences retrieve."""

    def __init__(
        self, request: RolloutRequest, settings: ChainSettings, *, threshold: float, mask_below: float, max_tokens: int
    ):
        """Create the Env of a request.

        Args:
            settings: with the budget of a sentence.
            threshold, mask_below: see `unsure_query`.
            max_tokens: the answer is asked for after so many tokens of accepted sentences.
        """
        super().__init__(request, settings)
        self._threshold, self._mask_below, self._num_left = threshold, mask_below, max_tokens
        self._is_look_ahead = True  # whether the next completion may be a query
        self._num_told = 0  # characters of the chain that a step has in its analysis

    def step(self, completion: Completion) -> Context | Search | Done:
        """See `Env.step`."""
        text = self._attempt.read(completion)
        if self._is_look_ahead and not self._is_answering:
            tokenizer = self._settings.writer.tokenizer
            if query := unsure_query(tokenizer, completion, self._threshold, self._mask_below):
                self._is_look_ahead = False
                analysis = f"{self._chain[self._num_told :]} {first_line(text)}"
                self._num_told = len(self._chain)
                return self._attempt.search(query, self._settings.top_k, analysis.strip())
        self._is_look_ahead = True
        if done := self._finish(text, thought=self._chain[self._num_told :]):
            return done
        sentence = as_sentence(text)
        if not sentence:
            return self._ask_for_answer()  # the model has ended its chain
        self._chain += f" {sentence}"
        self._num_left -= len(completion.ids)
        return self._ask_for_answer() if self._num_left <= 0 else self._context()

"""Reading a reply of `/v1/completions`: the sampled token ids, with the token that ended them, and log-probabilities.

OpenAI's API returns text. The ids come from the first of these that the reply holds:

    token_ids                        vLLM
    logprobs.content[].id            llama.cpp
    logprobs.tokens, "token_id:17"   vLLM with `return_tokens_as_token_ids`
    logprobs.tokens, as text         SGLang; unless a token is a part of a character, which has no text of its own
    text, encoded again              keeps the text, but not always its split into tokens

The token that ended a completion is the first of these:

    the last id, or the end of the text
    stop_reason (vLLM) or matched_stop (SGLang)
    the closing tag of the tag that the text leaves open, if closing tags such as `</answer>` end a step
    the end of the turn

Two cases are ambiguous in a reply without the first two: an end of turn inside a tag is read as the tag's closing, and
a closing tag without its opening tag as an end of turn.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion

MAX_LOGPROB = float(np.finfo(np.float32).max)  # of either sign


class MalformedReplyError(ValueError):
    """A reply that breaks a rule; the message completes the sentence "the server must answer"."""


class CompletionReader:
    """Reads the replies to requests of one tokenizer and set of stop tokens."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], stop_strings: Sequence[str] = ()):
        """`stop_ids` and `stop_strings` end a completion, in addition to the tokenizer's `turn_end_id`."""
        self._tokenizer, self.stop_strings = tokenizer, tuple(stop_strings)
        # id -> its text; empty for an id that the tokenizer does not know
        self.stop_texts = {id: tokenizer.decode([id]) for id in (*stop_ids, tokenizer.turn_end_id)}

    def read(self, reply: Any) -> Completion:
        """The completion in a JSON reply.

        Raises:
            MalformedReplyError: the reply lacks a text or a reason for its end, or holds ids of another vocabulary.
        """
        try:
            choice = reply["choices"][0]
            text, finish = choice["text"], choice["finish_reason"]
        except (KeyError, IndexError, TypeError):
            raise MalformedReplyError("choices with text and finish_reason") from None
        if not isinstance(text, str) or finish not in ("stop", "length"):
            raise MalformedReplyError("a text with finish_reason stop or length")
        usage = reply.get("usage")
        if isinstance(usage, dict) and usage.get("completion_tokens") == 0:
            raise MalformedReplyError("at least one sampled token")
        ids, logprobs = self._ids_and_logprobs(choice)
        if ids is None:
            ids, logprobs = self._tokenizer.encode(text, continues=True), []
        if num_kept := self._tokenizer.end_of(self.stop_strings, ids) if self.stop_strings else 0:
            ids, logprobs = ids[:num_kept], logprobs[:num_kept]
        is_known = 0 < len(logprobs) == len(ids) and all(
            isinstance(value, int | float) and abs(value) <= MAX_LOGPROB for value in logprobs
        )
        if not num_kept and finish == "stop" and not self._is_ended(ids):
            ending = self._ending(choice, text)
            ids, logprobs = [*ids, *ending], [*logprobs, *[np.nan] * len(ending)]
        if not ids:
            raise MalformedReplyError("at least one sampled token")
        return Completion(ids, np.asarray(logprobs, np.float32) if is_known else None)

    def _ids_and_logprobs(self, choice: dict[str, Any]) -> tuple[list[int] | None, list[Any]]:
        """The ids, None where the reply does not hold them, and the log-probabilities, of any length."""
        try:
            ids, values = self._find_ids(choice)
        except (AttributeError, TypeError, ValueError):
            raise MalformedReplyError("logprobs of OpenAI's form") from None
        if not isinstance(values, list):
            raise MalformedReplyError("logprobs of OpenAI's form")
        size = self._tokenizer.vocab_size
        is_valid = ids is None or (isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < size for i in ids))
        if not is_valid:
            raise MalformedReplyError(f"ids below {size}, the tokenizer's")
        return ids, values

    def _find_ids(self, choice: dict[str, Any]) -> tuple[Any, Any]:
        logprobs = choice.get("logprobs") or {}
        ids = choice.get("token_ids")
        if content := logprobs.get("content"):
            content_ids = [token.get("id") for token in content]
            if ids is None and None not in content_ids:
                ids = content_ids
            return ids, [token.get("logprob") for token in content]
        tokens = logprobs.get("tokens") or []
        if ids is None and tokens:
            if all(str(token).startswith("token_id:") for token in tokens):
                ids = [int(token.removeprefix("token_id:")) for token in tokens]
            else:
                ids = self._ids_of_texts(tokens, choice["text"])
        return ids, logprobs.get("token_logprobs") or []

    def _ids_of_texts(self, tokens: list[str], text: str) -> list[int] | None:
        """The ids of tokens given as texts; None where one is unknown or ambiguous, or they do not make up the text."""
        ids = [self._id_of_text.get(token) for token in tokens]
        joined = "".join(tokens)
        is_text = joined in (text, *(text + stop for stop in self.stop_texts.values()))
        return [id for id in ids if id is not None] if is_text and None not in ids else None

    @functools.cached_property
    def _id_of_text(self) -> dict[str, int | None]:
        """Text of a token -> its id; None where several tokens have the text, such as the bytes of a character."""
        ids: dict[str, int | None] = {}
        for id in range(self._tokenizer.vocab_size):
            text = self._tokenizer.decode([id])
            ids[text] = None if text in ids else id
        return ids

    def _is_ended(self, ids: Sequence[int]) -> bool:
        """Whether the ids hold their end: as a stop token, or spelled out in ordinary tokens, which ends no step."""
        texts = tuple(text for text in self.stop_texts.values() if text)
        return bool(ids) and (ids[-1] in self.stop_texts or self._tokenizer.decode(ids).endswith(texts))

    def _ending(self, choice: dict[str, Any], text: str) -> list[int]:
        """The token, or those of the stop string, that ended a completion whose text lacks it."""
        reason = choice.get("stop_reason", choice.get("matched_stop"))
        ends = [(stop, self._tokenizer.encode(stop, allow_special=False, continues=True)) for stop in self.stop_strings]
        ends += [(stop, [id]) for id, stop in self.stop_texts.items()]
        for stop, ids in ends:
            if reason is not None and (reason == stop or [reason] == ids):
                return ids
        if reason is None:
            closing = [(stop, ids) for stop, ids in ends if stop.startswith("</") and stop not in text]
            opened_at = {text.rfind(f"<{stop[2:]}"): ids for stop, ids in closing}
            if opened_at and max(opened_at) >= 0:
                return opened_at[max(opened_at)]
        return [self._tokenizer.turn_end_id]

"""A user's own inference server as sampler: any that speaks OpenAI's `/v1/completions` (vLLM, SGLang, llama.cpp).

What is exact: prompts are sent as token ids, so the server continues the very context that the engine of this package
would (`rollout.server.prompt_format=text` is for servers that take text alone). Sampled ids are the server's where it
tells them (vLLM: `token_ids`; llama.cpp: ids beside the log-probabilities) or spells every token (SGLang), unless one
is a part of a character; else its text is encoded again, which keeps the text but not always the split into tokens.
Fields that OpenAI's API lacks are sent unless `rollout.server.extra_fields` is false: they ask for ids, keep special
tokens in the text, and switch off sampling defaults of server or model.

Which token ended a step, in this order: the last sampled id, the end of the text, `stop_reason` (vLLM) or
`matched_stop` (SGLang), the closing tag of the tag left open, the end of turn. A server that tells
none of the first three leaves two cases open: a turn that ends inside a tag is read as if the tag had been closed, and
a closing tag without its opening one as an end of turn (that step is malformed either way).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from r3rag_jax.clients.endpoint import FIRST_WAIT_S, Endpoint
from r3rag_jax.config import RolloutConfig
from r3rag_jax.errors import UserError
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion, Context


class Server:
    """Client of one model on one server; its methods may be called from many threads."""

    def __init__(
        self,
        config: RolloutConfig,
        tokenizer: Tokenizer,
        *,
        eos_id: int,
        stop_ids: Sequence[int] = (),
        first_wait_s: float = FIRST_WAIT_S,
    ):
        """`eos_id` and `stop_ids` end a completion.

        Raises:
            UserError: the environment variable that `rollout.server.key_env` names is not set.
        """
        self.max_length = config.max_length
        self._config, self._tokenizer, server = config, tokenizer, config.server
        self.max_in_flight = server.max_in_flight or config.slots
        self._eos_id = eos_id
        self._ends = {id: tokenizer.decode([id]) for id in (*stop_ids, eos_id)}
        hint = "for a server that refuses fields beyond OpenAI's: rollout.server.extra_fields=false"
        self._endpoint = Endpoint(
            server.replace(max_in_flight=self.max_in_flight), name="rollout.server", first_wait_s=first_wait_s,
            hints=dict.fromkeys((400, 422), hint) if server.extra_fields else None,
        )  # fmt: skip

    @property
    def model(self) -> str:
        """`rollout.server.model`, or the first model that the server lists."""
        return self._endpoint.model

    def complete(self, context: Context) -> Completion:
        """Sample behind a context.

        Raises:
            UserError: the context leaves no room, the server refuses or keeps failing, or its reply is malformed.
        """
        length = len(context.ids)
        if not 1 <= length < self.max_length:
            raise UserError(f"a context must hold 1 to {self.max_length - 1} tokens; got {length}")
        ids = [int(i) for i in context.ids]
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": ids if self._config.server.prompt_format == "ids" else self._tokenizer.decode(ids),
            "max_tokens": min(context.budget, self.max_length - length),
            "temperature": context.temperature,
            "top_p": self._config.top_p,
            "stop": list(self._ends.values())[:4],  # OpenAI takes four
            "logprobs": 1,
        }
        if context.key is not None:
            body["seed"] = int(context.key[0]) >> 1  # 31 bits, which every server takes
        if self._config.server.extra_fields:
            body |= {
                "stop_token_ids": list(self._ends),
                "include_stop_str_in_output": True,  # vLLM
                "no_stop_trim": True,  # SGLang
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
                "add_special_tokens": False,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "min_p": self._config.min_p,
                "top_k": self._config.top_k_tokens or -1,
                "repetition_penalty": 1.0,
            }
        reply = self._endpoint.call("/completions", body)
        ids, logprobs = self._read(reply)
        # Servers report them at temperature 1 or at the sampling temperature, and before a truncation or behind it.
        is_as_sampled = context.temperature in (0.0, 1.0) and not self._config.truncates
        return Completion(ids, logprobs if is_as_sampled else None)

    # ---- the reply

    def _read(self, reply: Any) -> tuple[list[int], np.ndarray | None]:
        """Sampled ids, with the token that ended them, and their log-probabilities where they are told."""
        try:
            choice = reply["choices"][0]
            text, finish = choice["text"], choice["finish_reason"]
        except (KeyError, IndexError, TypeError):
            raise self._endpoint.malformed("/completions", "choices with text and finish_reason", reply) from None
        if not isinstance(text, str) or finish not in ("stop", "length"):
            raise self._endpoint.malformed("/completions", "a text with finish_reason stop or length", reply)
        usage = reply.get("usage")
        if isinstance(usage, dict) and usage.get("completion_tokens") == 0:
            raise self._endpoint.malformed("/completions", "at least one sampled token", reply)
        ids, values = self._told(choice, reply)
        if ids is None:
            ids, values = self._tokenizer.encode(text), []
        if finish == "stop" and not self._has_ended(ids):
            ids = [*ids, self._ending(choice, text)]
        if not ids:
            raise self._endpoint.malformed("/completions", "at least one sampled token", reply)
        is_known = len(values) == len(ids) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
        return ids, np.asarray(values, np.float32) if is_known else None

    def _told(self, choice: dict[str, Any], reply: Any) -> tuple[list[int] | None, list[Any]]:
        """Ids where the server tells them, and their log-probabilities (or nothing)."""
        try:
            logprobs = choice.get("logprobs") or {}
            spelled, values = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
            content = logprobs.get("content") or []  # llama.cpp
            ids = choice.get("token_ids")
            if content:
                spelled, values = [c.get("token") for c in content], [c.get("logprob") for c in content]
                ids = [c.get("id") for c in content] if ids is None else ids
                ids = None if ids is not None and None in ids else ids
            elif ids is None and spelled and all(str(token).startswith("token_id:") for token in spelled):
                ids = [int(token.removeprefix("token_id:")) for token in spelled]
            elif ids is None and spelled:
                ids = self._unspelled(spelled, choice["text"])
        except (AttributeError, TypeError, ValueError):
            raise self._endpoint.malformed("/completions", "logprobs of OpenAI's form", reply) from None
        if ids is not None and not all(isinstance(i, int) and 0 <= i < self._tokenizer.vocab_size for i in ids):
            raise self._endpoint.malformed(
                "/completions", f"ids below {self._tokenizer.vocab_size}, the tokenizer's", reply
            )
        return ids, values

    def _unspelled(self, tokens: list[str], text: str) -> list[int] | None:
        """The ids of tokens given as text; None where one is unknown or ambiguous, or they do not spell the text."""
        ids = [self._id_of.get(token) for token in tokens]
        whole = "".join(tokens)
        is_text = whole in (text, *(text + end for end in self._ends.values()))
        return [id for id in ids if id is not None] if is_text and None not in ids else None

    @functools.cached_property
    def _id_of(self) -> dict[str, int | None]:
        """Token as text -> id; None where several are spelled so, such as the bytes of a character."""
        ids: dict[str, int | None] = {}
        for id in range(self._tokenizer.vocab_size):
            token = self._tokenizer.decode([id])
            ids[token] = None if token in ids else id
        return ids

    def _has_ended(self, ids: Sequence[int]) -> bool:
        """Whether the end is among the ids: as a token, or spelled out in ordinary ones, which ends no step."""
        return bool(ids) and (ids[-1] in self._ends or self._tokenizer.decode(ids).endswith(tuple(self._ends.values())))

    def _ending(self, choice: dict[str, Any], text: str) -> int:
        """The token that ended a completion whose text lacks it."""
        reason = choice.get("stop_reason", choice.get("matched_stop"))
        for id, end in self._ends.items():
            if reason is not None and reason in (id, end):
                return id
        if reason is None:
            tags = {id: end for id, end in self._ends.items() if end.startswith("</")}
            opened = {text.rfind(f"<{end[2:]}"): id for id, end in tags.items() if end not in text}
            if opened and max(opened) >= 0:
                return opened[max(opened)]
        return self._eos_id

    # ---- a round of calls

    def session(self) -> AbstractContextManager[None]:
        """A round of calls; an exception inside ends the retries of those in flight."""
        return self._endpoint.session()

    def give_up(self) -> None:
        """Calls in flight are not retried any more."""
        self._endpoint.give_up()

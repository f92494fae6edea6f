"""A user's inference server as sampler: any that speaks OpenAI's `/v1/completions` (vLLM, SGLang, llama.cpp).

Prompts are sent as token ids, so that the server continues exactly the context that the built-in engine would
(`rollout.server.prompt_format=text` is for servers that take text alone). Unless `rollout.server.extra_fields` is
false, the requests hold fields that OpenAI's API lacks: they ask for ids, keep special tokens in the text, and switch
off sampling defaults of server or model. Reading the replies is described in `completion_reply.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from r3rag_jax.clients.completion_reply import CompletionReader, MalformedReplyError
from r3rag_jax.clients.endpoint import FIRST_WAIT_S, Endpoint
from r3rag_jax.clients.streamed_reply import StreamedReply
from r3rag_jax.config import RolloutConfig
from r3rag_jax.errors import UserError
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion, Context

PATH = "/completions"
MAX_STOPS = 4  # stop strings in a request of OpenAI's API


class CompletionsClient:
    """Samples from one model on one server; its methods may be called from many threads."""

    def __init__(
        self,
        config: RolloutConfig,
        tokenizer: Tokenizer,
        *,
        stop_ids: Sequence[int],
        stop_strings: Sequence[str] = (),
        first_wait_s: float = FIRST_WAIT_S,
    ):
        """
        Args:
            stop_ids: tokens that end a completion, the most important ones first: OpenAI's API has few stop strings.
            stop_strings: text that ends a completion, wherever in a token it ends.
            first_wait_s: seconds before the first retry of a request.

        Raises:
            UserError: the environment variable that `rollout.server.key_env` names is not set.
        """
        self.max_length = config.max_length
        self._config, self._tokenizer = config, tokenizer
        self._reader = CompletionReader(tokenizer, stop_ids, stop_strings)
        hint = "for a server that refuses fields beyond OpenAI's: rollout.server.extra_fields=false"
        self._endpoint = Endpoint(
            config.server, name="rollout.server", first_wait_s=first_wait_s,
            hints=dict.fromkeys((400, 422), hint) if config.server.extra_fields else None,
        )  # fmt: skip

    @property
    def model(self) -> str:
        """`rollout.server.model`, or the first model that the server lists."""
        return self._endpoint.model

    def complete(self, context: Context, on_ids: Callable[[list[int]], None] | None = None) -> Completion:
        """Sample a continuation of the context.

        Args:
            on_ids: asks the server to stream, and is called in another thread with the ids so far when more text has
                come; those of its text, which need not be the sampled ones. What it raises ends the request, and is
                raised here.

        Raises:
            UserError: the context has no tokens or fills the row, the server refuses or keeps failing, or its reply is
                malformed.
        """
        length = len(context.ids)
        if not 1 <= length < self.max_length:
            raise UserError(f"a context must hold 1 to {self.max_length - 1} tokens; got {length}")
        body, streamed = self._body(context), None
        if on_ids is not None:
            streamed = StreamedReply(lambda text: on_ids(self._tokenizer.encode(text, continues=True)))
            body["stream"] = True
        reply = self._endpoint.call(PATH, body, streamed)
        try:
            completion = self._reader.read(reply)
        except MalformedReplyError as error:
            raise self._endpoint.malformed(PATH, str(error), reply) from None
        # Servers report log-probabilities at temperature 1 or at the sampling temperature, and before or after they
        # leave out unlikely tokens; greedy requests leave out none.
        is_as_sampled = context.temperature == 0 or (context.temperature == 1 and not self._config.truncates)
        return completion if is_as_sampled else Completion(completion.ids, None)

    def _body(self, context: Context) -> dict[str, Any]:
        config, stops = self._config, self._reader.stop_texts
        is_greedy = context.temperature == 0  # the most likely token is never left out
        stop_texts = dict.fromkeys([*self._reader.stop_strings, *stops.values()])
        ids = [int(i) for i in context.ids]
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": ids if config.server.prompt_format == "ids" else self._tokenizer.decode_prompt(ids),
            "max_tokens": min(context.budget, self.max_length - len(ids)),
            "temperature": context.temperature,
            "top_p": 1.0 if is_greedy else config.top_p,
            "stop": [text for text in stop_texts if text][:MAX_STOPS],
            "logprobs": 1,
        }
        if context.key is not None:
            body["seed"] = int(context.key[0]) >> 1  # 31 bits, which every server takes
        if config.server.extra_fields:
            body |= {
                "stop_token_ids": list(stops),
                "include_stop_str_in_output": True,  # vLLM
                "no_stop_trim": True,  # SGLang
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
                "add_special_tokens": False,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "min_p": 0.0 if is_greedy else config.min_p,
                "top_k": -1 if is_greedy else config.top_k_tokens or -1,
                "repetition_penalty": 1.0,
            }
        return body

    def session(self) -> AbstractContextManager[None]:
        """A session of calls, with its own retries; an exception inside ends the retries of those in flight."""
        return self._endpoint.session()

    def give_up(self) -> None:
        """End the retries of the session's calls."""
        self._endpoint.give_up()

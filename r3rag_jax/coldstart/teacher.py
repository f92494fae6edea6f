"""Who writes the steps: a chat model on any OpenAI-compatible server, or a Hugging Face model on the own devices.

Both are backends of the rollout loop. A server takes and gives text, so its "ids" are the characters of the text, and
one more id that says how the reply has ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from r3rag_jax.clients.chat import PATH, read_message
from r3rag_jax.clients.endpoint import FIRST_WAIT_S, Endpoint
from r3rag_jax.coldstart.journal import Journal, Reply
from r3rag_jax.coldstart.spending import TokenLimit, most_tokens, used_tokens
from r3rag_jax.coldstart.teacher_env import STOP
from r3rag_jax.config import ColdStartConfig
from r3rag_jax.errors import ServiceError, UserError
from r3rag_jax.rollout.backends import ServerGeneration
from r3rag_jax.rollout.env import StopRule
from r3rag_jax.text.message_frame import MessageFrame
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion, Context

WHOLE, CUT_OFF, FAILED = 0x110000, 0x110001, 0x110002  # the last id of a served completion; no character has them
MIN_FAILURES = 5  # fewer do not end a build: one failure in three requests is a large share already


class ServedText:
    """`TeacherText` of a server, which applies a chat template of its own."""

    max_length = 1 << 40  # the server knows, and refuses what is longer

    def prompt_ids(self, prompt: str) -> list[int]:
        """See `TeacherText.prompt_ids`."""
        return [*map(ord, prompt)]

    def read(self, ids: Sequence[int]) -> Reply | None:
        """See `TeacherText.read`."""
        *characters, end = ids
        return None if end == FAILED else Reply("".join(map(chr, characters)), is_whole=end == WHOLE)


class LocalText:
    """`TeacherText` of a model on the own devices."""

    def __init__(self, tokenizer: Tokenizer, max_length: int):
        """`max_length`: tokens of prompt and reply together."""
        self.max_length, self._tokenizer = max_length, tokenizer
        self._frame = MessageFrame.chat(tokenizer)

    def prompt_ids(self, prompt: str) -> list[int]:
        """See `TeacherText.prompt_ids`."""
        return self._frame.ids(prompt)

    def read(self, ids: Sequence[int]) -> Reply | None:
        """See `TeacherText.read`."""
        said = self._tokenizer.without_end(ids)
        return Reply(self._tokenizer.decode(said, skip_special=True), is_whole=len(said) < len(ids))


class TeacherClient:
    """Asks a served teacher for single steps; what the journal knows is not asked again."""

    def __init__(
        self,
        config: ColdStartConfig,
        journal: Journal,
        *,
        first_wait_s: float = FIRST_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            journal: takes every reply before it is used.
            first_wait_s: seconds before the first retry of a request.
            clock: of the limit of tokens per minute, seconds.

        Raises:
            UserError: the URL is invalid, or the environment variable of the key is not set.
        """
        self._config, self._journal = config, journal
        self._endpoint = Endpoint(config.teacher, name="coldstart.teacher", first_wait_s=first_wait_s)
        per_minute = config.teacher.tokens_per_minute
        self._limit = TokenLimit(per_minute, clock) if per_minute else None
        self._lock = threading.Lock()
        self._num_requests = 0
        self.failures: list[str] = []  # reasons, in the order in which they came
        self._is_stopped = False  # the session ends: requests under way may fail
        self._end: UserError | None = None  # too many have failed

    @property
    def model(self) -> str:
        """`coldstart.teacher.model`, or the first model that the server lists."""
        return self._endpoint.model

    def complete(self, context: Context) -> Completion:
        """Return the teacher's reply to a prompt, as ids of `ServedText`. A request that fails gives the id FAILED.

        Raises:
            ServiceError: more than `coldstart.max_failure_share` of the requests have failed, or the session has ended.
        """
        prompt = "".join(map(chr, context.ids))
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": context.temperature,
            "max_tokens": context.budget,
            "stop": [STOP],
        }
        if context.key is not None:
            body["seed"] = int(context.key[0]) >> 1  # 31 bits, which every server takes
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        reply = self._journal.reply(key)
        if reply is None:
            try:
                reply = self._ask(prompt, body)
            except UserError as error:
                self._fail(key, error)
                return Completion([FAILED], None)
            self._journal.add_reply(key, reply)
        return Completion([*map(ord, reply.text), WHOLE if reply.is_whole else CUT_OFF], None)

    def _ask(self, prompt: str, body: dict[str, Any]) -> Reply:
        reserved = most_tokens(prompt, body["max_tokens"])
        if self._limit is not None and self._endpoint.pause(self._limit.reserve(reserved)):
            raise UserError("given up before it was asked")
        with self._lock:
            self._num_requests += 1
        reply = self._read(self._endpoint.call(PATH, body))
        if self._limit is not None:
            self._limit.give_back(reserved - used_tokens(reply, prompt))
        return reply

    def _read(self, reply: Any) -> Reply:
        text, finish = read_message(self._endpoint, reply)
        usage = reply.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        return Reply(text, finish != "length", _count(counts, "prompt_tokens"), _count(counts, "completion_tokens"))

    def _fail(self, key: str, error: UserError) -> None:
        """Count a failed request; a share that is too large ends the build."""
        with self._lock:
            if self._end is not None:
                raise self._end
            if self._is_stopped:
                raise error
            self.failures.append(str(error))
            num, most = len(self.failures), self._config.max_failure_share * self._num_requests
            if num >= MIN_FAILURES and num > most:
                self._end = ServiceError(
                    f"the teacher {self._endpoint.url} failed in {num} of {self._num_requests} requests, more than "
                    f"coldstart.max_failure_share={self._config.max_failure_share:g} allows; {self._journal.path} "
                    f"keeps all replies; the first failure: {self.failures[0]}"
                )
        self._journal.add_failure(key, str(error))
        if self._end is not None:
            raise self._end

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """A session of requests; an exception inside ends the retries of those in flight, whose replies are kept."""
        with self._endpoint.session():
            self._is_stopped, self._end = False, None
            try:
                yield
            except BaseException:
                self._is_stopped = True
                raise

    def give_up(self) -> None:
        """End the retries of the session's requests."""
        self._endpoint.give_up()


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    """A number of tokens as a server states it; None where it does not."""
    count = usage.get(name)
    return count if type(count) is int and count >= 0 else None


class ServedBackend:
    """The rollout backend of a served teacher, with at most `coldstart.teacher.max_in_flight` requests at a time."""

    def __init__(self, client: TeacherClient, num_slots: int):
        self._client, self.num_slots = client, num_slots

    @contextlib.contextmanager
    def generate(self, stops: StopRule) -> Iterator[ServerGeneration]:
        """See `RolloutBackend.generate`."""
        with ThreadPoolExecutor(self.num_slots) as pool, self._client.session():
            yield ServerGeneration(self._client, pool)

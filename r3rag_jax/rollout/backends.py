"""Backends that sample completions: the engine of this package and an inference server, behind one interface.

A backend has a fixed number of slots, in each of which one context can be completed. `generate` begins a rollout and
returns its `Generation`, through which contexts go in and completions come out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Protocol

from r3rag_jax.clients.completions import CompletionsClient
from r3rag_jax.clients.endpoint import FIRST_WAIT_S
from r3rag_jax.config import RolloutConfig
from r3rag_jax.errors import UserError
from r3rag_jax.rollout.env import StopRule
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.sampler.state import RowStatus
from r3rag_jax.sampler.stops import StopTokens
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion, Context


class Generation(Protocol):
    """The completions of one rollout."""

    @property
    def num_active(self) -> int:
        """Number of slots whose completion has begun and has not been returned by `wait`."""
        ...

    @property
    def is_open(self) -> bool:
        """False after a completion has failed: active ones still finish, and further contexts are ignored."""
        ...

    def submit(self, contexts: Mapping[int, Context]) -> None:
        """Begin the completions of contexts, given as slot -> context; none of these slots may be active."""
        ...

    def wait(self) -> list[tuple[int, Completion]]:
        """Work for a bounded time, or until a completion is finished; return the finished ones as (slot, completion).

        Raises:
            UserError: a completion failed. The error is raised when no slot is active any more.
        """
        ...


class RolloutBackend(Protocol):
    """Samples completions of contexts."""

    @property
    def num_slots(self) -> int:
        """Number of contexts that can be completed in parallel."""
        ...

    def generate(self, stops: StopRule) -> AbstractContextManager[Generation]:
        """Begin a rollout whose completions end by the given rule. A backend carries out one rollout at a time."""
        ...


class EngineBackend:
    """The engine of this package with one policy. It decodes the active rows together, a bounded call at a time."""

    def __init__(
        self,
        engine: Engine,
        policy: CachedDecoder,
        tokenizer: Tokenizer,
        *,
        decode_chunk: int,
        leave_fraction: float = 0.5,
    ):
        """Create the backend; its policy is fixed.

        Args:
            policy: what `engine.load` returned.
            decode_chunk: maximum number of tokens per row in one decode call.
            leave_fraction: a decode call returns as soon as this fraction of its active rows has ended. With a small
                one rows wait less for each other, with a large one there are fewer calls.
        """
        self._engine, self._policy, self._tokenizer = engine, policy, tokenizer
        self._decode_chunk, self._leave_fraction = decode_chunk, leave_fraction

    @property
    def num_slots(self) -> int:
        """See `RolloutBackend.num_slots`."""
        return self._engine.slots

    @contextlib.contextmanager
    def generate(self, stops: StopRule) -> Iterator[EngineGeneration]:
        """See `RolloutBackend.generate`."""
        strings = stops.stop_strings
        end_of = functools.partial(self._tokenizer.end_of, strings) if strings else None
        self._engine.reset()
        yield EngineGeneration(
            self._engine,
            self._policy,
            StopTokens(stops.pause_ids, stops.stop_ids, end_of),
            self._decode_chunk,
            self._leave_fraction,
        )


class EngineGeneration:
    """The completions of one rollout in the rows of an engine; slot number = row number."""

    is_open = True

    def __init__(
        self, engine: Engine, policy: CachedDecoder, stops: StopTokens, decode_chunk: int, leave_fraction: float
    ):
        self._engine, self._policy, self._stops = engine, policy, stops
        self._decode_chunk, self._leave_fraction = decode_chunk, leave_fraction
        self._starts: dict[int, int] = {}  # slot -> length of its context

    @property
    def num_active(self) -> int:
        """See `Generation.num_active`."""
        return len(self._engine.find(RowStatus.ACTIVE))

    def submit(self, contexts: Mapping[int, Context]) -> None:
        """See `Generation.submit`. Contexts are prefilled together, each from where it differs from its row's cache."""
        self._engine.set_context(self._policy, contexts)
        self._engine.wait()  # else the next decode call would be charged with the prefill
        self._starts |= {slot: len(context.ids) for slot, context in contexts.items()}

    def wait(self) -> list[tuple[int, Completion]]:
        """See `Generation.wait`: one decode call."""
        engine, rows = self._engine, self._engine.rows
        if num_active := self.num_active:
            leave_at = max(1, int(num_active * self._leave_fraction))
            engine.decode(self._policy, self._decode_chunk, leave_at, self._stops)
        completions = []
        for slot in engine.find(RowStatus.NEEDS_RETRIEVAL, RowStatus.DONE):
            sampled = slice(self._starts[slot], int(rows.lengths[slot]))
            completions.append(
                (slot, Completion(rows.tokens[slot, sampled].tolist(), rows.logprobs[slot, sampled].copy()))
            )
            engine.release(slot)
        return completions


class ServerBackend:
    """An inference server, with at most one request in flight per slot; see `clients/completions.py`."""

    def __init__(self, config: RolloutConfig, tokenizer: Tokenizer, *, first_wait_s: float = FIRST_WAIT_S):
        """`first_wait_s`: the wait before the first retry of a failed request."""
        self._config, self._tokenizer, self._first_wait_s = config, tokenizer, first_wait_s

    @property
    def num_slots(self) -> int:
        """See `RolloutBackend.num_slots`."""
        return self._config.server.max_in_flight or self._config.slots

    @contextlib.contextmanager
    def generate(self, stops: StopRule) -> Iterator[ServerGeneration]:
        """See `RolloutBackend.generate`.

        Raises:
            UserError: the environment variable with the server's key is not set.
        """
        server = self.open_client(stops)
        with ThreadPoolExecutor(self.num_slots) as pool, server.session():
            yield ServerGeneration(server, pool)

    def open_client(self, stops: StopRule) -> CompletionsClient:
        """A client whose completions end by the given rule.

        Raises:
            UserError: the environment variable with the server's key is not set.
        """
        return CompletionsClient(
            self._config, self._tokenizer, stop_ids=[*stops.pause_ids, *stops.stop_ids],
            stop_strings=stops.stop_strings, first_wait_s=self._first_wait_s,
        )  # fmt: skip


class Completer(Protocol):
    """A client that completes one context; called from many threads."""

    def complete(self, context: Context) -> Completion:
        """Raises a UserError where the server does not."""
        ...

    def give_up(self) -> None:
        """End the retries of the calls in flight."""
        ...


class ServerGeneration:
    """The completions of one rollout that are requested from a server."""

    def __init__(self, server: Completer, pool: ThreadPoolExecutor):
        self._server, self._pool = server, pool
        self._in_flight: dict[Future[Completion], int] = {}  # request -> slot
        self._failure: UserError | None = None

    @property
    def num_active(self) -> int:
        """See `Generation.num_active`."""
        return len(self._in_flight)

    @property
    def is_open(self) -> bool:
        """See `Generation.is_open`."""
        return self._failure is None

    def submit(self, contexts: Mapping[int, Context]) -> None:
        """See `Generation.submit`: a request per context."""
        if self.is_open:
            for slot, context in contexts.items():
                self._in_flight[self._pool.submit(self._server.complete, context)] = slot

    def wait(self) -> list[tuple[int, Completion]]:
        """See `Generation.wait`. Waits until at least one completion has arrived, or none is in flight."""
        completions: list[tuple[int, Completion]] = []
        while self._in_flight and not completions:
            done = wait(self._in_flight, return_when=FIRST_COMPLETED).done
            for future in sorted(done, key=self._in_flight.__getitem__):
                slot = self._in_flight.pop(future)
                try:
                    completions.append((slot, future.result()))
                except UserError as error:
                    self._failure = self._failure or error
                    self._server.give_up()  # requests in flight are not retried
        if not completions and self._failure is not None:
            raise self._failure
        return completions

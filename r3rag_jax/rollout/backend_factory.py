"""Chooses who samples, the engine of this package or the user's inference server, and hands it a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from r3rag_jax.config import RolloutConfig
from r3rag_jax.rollout.backends import EngineBackend, RolloutBackend, ServerBackend
from r3rag_jax.rollout.env import StopRule
from r3rag_jax.rollout.live_sampling import EngineSampler, ServerSampler
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.text.tokenizer import Tokenizer

LoadParams = Callable[[], Any]  # returns parameters of the policy's decoder


class EngineBackends:
    """Makes backends of one engine, each with a policy of its own."""

    def __init__(self, config: RolloutConfig, engine: Engine, tokenizer: Tokenizer, param_shardings: Any = None):
        """`param_shardings`: where parameters are copied to first; None: they are on the sampler's devices."""
        self._config, self._engine, self._tokenizer = config, engine, tokenizer
        self._param_shardings = param_shardings

    def __call__(self, load: LoadParams) -> EngineBackend:
        """A backend with a copy of the parameters, which may be donated as soon as this returns."""
        params = load()
        if self._param_shardings is not None:
            params = jax.device_put(params, self._param_shardings)
        return EngineBackend(
            self._engine, self._engine.load(params), self._tokenizer, decode_chunk=self._config.decode_chunk
        )

    def live(
        self, policies: Mapping[str, LoadParams], stops: StopRule, *, compiles_ahead: bool = False
    ) -> EngineSampler:
        """A sampler for the live scheduler, in the rows of the engine, with a copy of the parameters of each policy.

        Args:
            compiles_ahead: compile every program of the engine now, so that no question waits for it.
        """
        decoders: dict[str, CachedDecoder] = {}
        for name, load in policies.items():
            params = load()
            if self._param_shardings is not None:
                params = jax.device_put(params, self._param_shardings)
            decoders[name] = self._engine.load(params)
            if compiles_ahead and len(decoders) == 1:
                self._engine.warm_up(decoders[name])
        return EngineSampler(self._engine, decoders, self._tokenizer, stops)


class ServerBackends:
    """Makes backends of the user's inference server, which has a policy of its own: none is loaded."""

    def __init__(self, config: RolloutConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer

    def __call__(self, load: LoadParams) -> ServerBackend:
        return ServerBackend(self._config, self._tokenizer)

    def live(
        self, policies: Mapping[str, LoadParams], stops: StopRule, *, compiles_ahead: bool = False
    ) -> ServerSampler:
        """A sampler for the live scheduler; whichever policies are named, the server's samples.

        Raises:
            UserError: the environment variable with the server's key is not set.
        """
        backend = self(lambda: None)
        return ServerSampler(backend.open_client(stops), backend.num_slots)


MakeBackend = Callable[[LoadParams], RolloutBackend]
AnyBackends = EngineBackends | ServerBackends

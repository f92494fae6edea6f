"""Chooses who samples, the engine of this package or the user's inference server, and hands it a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from r3rag_jax.config import RolloutConfig
from r3rag_jax.rollout.backends import EngineBackend, RolloutBackend, ServerBackend
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


class ServerBackends:
    """Makes backends of the user's inference server, which has a policy of its own: none is loaded."""

    def __init__(self, config: RolloutConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer

    def __call__(self, load: LoadParams) -> ServerBackend:
        return ServerBackend(self._config, self._tokenizer)


MakeBackend = Callable[[LoadParams], RolloutBackend]

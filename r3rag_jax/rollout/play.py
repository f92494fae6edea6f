"""One question on its way through an Env, with the tokens that it has cost; the unit of both schedulers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from r3rag_jax.retrieval.base import Hit
from r3rag_jax.rollout.env import Done, Env, Transition
from r3rag_jax.types import Completion, Context, Trajectory


class Play:
    """Passes an Env's transitions on and counts tokens."""

    def __init__(self, env: Env):
        self.env = env
        self._num_read = 0  # tokens of the prompts
        self._num_written = 0  # tokens sampled

    def start(self) -> Transition:
        """See `Env.start`."""
        return self.env.start()

    def submitted(self, context: Context) -> None:
        """The context is being completed."""
        self._num_read += len(context.ids)

    def step(self, completion: Completion) -> Transition:
        """See `Env.step`."""
        self._num_written += len(completion.ids)
        return self.env.step(completion)

    def observe(self, hits: Sequence[Hit]) -> Transition:
        """See `Env.observe`."""
        return self.env.observe(hits)

    def trajectory(self, done: Done) -> Trajectory:
        """The finished trajectory, with the numbers of tokens that were read and written for it."""
        return dataclasses.replace(done.trajectory, num_tokens=self._num_written, num_input_tokens=self._num_read)

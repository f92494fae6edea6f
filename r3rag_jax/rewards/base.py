"""The contract of a reward term, and the resources that terms may need.

Shape suffixes: B trajectories, K steps of a trajectory, N inquiries to a judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from r3rag_jax.retrieval.base import Encoder
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.rewards.judge.prompts import Inquiry
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Sample, Trajectory

T = TypeVar("T")


class Likelihood(Protocol):
    """How probable texts are to a policy (`training/likelihood.py`)."""

    @property
    def codec(self) -> Codec: ...

    def __call__(self, groups: Sequence[Sequence[Sample]]) -> list[list[np.ndarray]]:
        """For each sample of each group the log-probabilities of the tokens in its loss_mask, float32 [tokens]."""
        ...


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a term may need besides the trajectories; every resource but `max_steps` is optional."""

    max_steps: int  # K, the most steps of a trajectory (rollout.max_steps); the width of process rewards
    encoder: Encoder | None = None
    judge: Judge | None = None
    likelihood: Likelihood | None = None  # under the reference policy
    verdicts_N: np.ndarray | None = None  # float32, in the order of the term's own `inquiries`; NaN = failed
    answers: dict[str, np.ndarray] | None = None  # `answer_metrics` of the same trajectories; None: not yet computed


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """A row of PROCESS_REWARDS or OUTCOME_REWARDS (`terms.py`).

    Attributes:
        rewards: (trajectories, resources) -> float32 [B, K] of a process reward, 0 where a trajectory has no such
            step; float32 [B] of an outcome reward, 0 without an answer. NaN = unknown, for a judgement has failed.
        needs: names of the optional resources that it reads.
        inquiries: (trajectories, resources) -> what the judge must be asked before `rewards` is called, which then
            finds the verdicts in `resources.verdicts_N`. The scorer asks the inquiries of all terms in one round.
    """

    rewards: Callable[[Sequence[Trajectory], Resources], np.ndarray]
    needs: tuple[str, ...] = ()
    inquiries: Callable[[Sequence[Trajectory], Resources], list[Inquiry]] | None = None


def required(resource: T | None, name: str) -> T:
    """The resource.

    Raises:
        ValueError: it is None.
    """
    if resource is None:
        raise ValueError(f"this reward term needs {name}; got none")
    return resource


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` and at least 1: padding to it keeps compiled shapes few."""
    return 1 << max(0, size - 1).bit_length()

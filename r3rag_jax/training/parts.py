"""What the training phases are given: the parts of a run that they use, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from r3rag_jax.config import Config
from r3rag_jax.models.policy import Policy
from r3rag_jax.rewards.scorer import Scorer
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.metrics import MetricsLog
from r3rag_jax.run.trajectories import TrajectoryLog
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.types import Question, Trajectory


@dataclasses.dataclass(frozen=True)
class TrainingParts:
    """The parts of both phases."""

    config: Config
    run: RunDirectory
    mesh: Mesh
    sampler_mesh: Mesh
    policy: Policy
    log: MetricsLog
    console: Console
    cache_dtype: Any  # of the sampler's keys and values
    shares_prefixes: bool  # whether samples that begin alike are trained as one sequence, see prefix_tree.py


@dataclasses.dataclass(frozen=True)
class RolloutParts:
    """What RL needs to sample and to score trajectories."""

    questions: Sequence[Question]
    dev_questions: Sequence[Question]  # evaluated every `rl.eval_every` iterations
    copy_policy: Callable[[Any], CachedDecoder]  # parameters -> the sampler's copy of them
    rollout: Callable[[CachedDecoder, Sequence[RolloutRequest]], list[Trajectory]]
    scorer: Scorer
    kept: TrajectoryLog  # a few trajectories per iteration

"""The trajectories of an RL iteration, with other questions in the place of those that teach nothing."""

from __future__ import annotations

import dataclasses

import numpy as np

from r3rag_jax.errors import UserError
from r3rag_jax.rewards.scorer import Scores, learnable
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.training.parts import RolloutParts, TrainingParts
from r3rag_jax.training.requests import iteration_requests, replacement_requests
from r3rag_jax.training.trainer import equal_groups, number_groups
from r3rag_jax.types import Trajectory


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What an iteration has sampled."""

    trajectories: list[Trajectory]
    scores: Scores | None  # of all of them, where resampling has already asked for them


class IterationSampler:
    """Samples iterations; a function of configuration, iteration and policy alone."""

    def __init__(self, parts: TrainingParts, rollouts: RolloutParts):
        """Raises:
        UserError: asynchronous rollouts would share several devices with the updates.
        """
        mesh, config = parts.sampler_mesh, parts.config
        if config.rl.async_rollouts and mesh is parts.mesh and mesh.size > 1:
            raise UserError(
                "rl.async_rollouts must have one device, or mesh.sampler_devices of its own: two threads cannot "
                f"launch programs on the same {mesh.size} devices; got mesh.sampler_devices="
                f"{config.mesh.sampler_devices}"
            )
        self._config, self._rollouts = config, rollouts

    def sample(self, iteration: int, policy: CachedDecoder) -> Sampled:
        """The iteration's trajectories; up to `rl.max_resamples` rounds replace questions of zero variance (DAPO)."""
        config, parts = self._config, self._rollouts
        trajectories = parts.rollout(policy, iteration_requests(config, parts.questions, iteration))
        for round_ in range(1, 1 + config.rl.max_resamples):
            scores = parts.scorer.score(trajectories)
            known, known_scores = learnable(trajectories, scores)
            groups = number_groups(known)
            is_equal = equal_groups(known_scores.rewards, groups, totals=config.rl.returns == "total")
            num_missing = config.rl.questions - len(np.unique(groups[~is_equal]))
            taken = {trajectory.question.id for trajectory in trajectories}
            requests = replacement_requests(config, parts.questions, iteration, round_, num_missing, taken)
            if not requests:
                return Sampled(trajectories, scores)
            trajectories = trajectories + parts.rollout(policy, requests)
        return Sampled(trajectories, None)

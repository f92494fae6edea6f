"""The tables of reward terms: the values of the keys `rewards.process` and `rewards.outcome`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r3rag_jax.config import RewardConfig
from r3rag_jax.rewards import answer, embedding, gain, gold
from r3rag_jax.rewards.base import Resources, RewardTerm
from r3rag_jax.rewards.judge import correctness, relevance
from r3rag_jax.types import Trajectory

PROCESS_REWARDS: dict[str, RewardTerm] = {
    "gold": RewardTerm(gold.gold_rewards),
    "embedding": RewardTerm(embedding.embedding_rewards, needs=("encoder",)),
    "gain": RewardTerm(gain.gain_rewards, needs=("likelihood",)),
    "judge": RewardTerm(relevance.relevance_rewards, needs=("judge",), inquiries=relevance.inquiries),
}
OUTCOME_REWARDS: dict[str, RewardTerm] = {
    "em": RewardTerm(answer.em_rewards),
    "f1": RewardTerm(answer.f1_rewards),
    "cover_em": RewardTerm(answer.cover_em_rewards),
    "judge": RewardTerm(correctness.correctness_rewards, needs=("judge",), inquiries=correctness.inquiries),
}


def _no_rewards(trajectories: Sequence[Trajectory], resources: Resources) -> np.ndarray:
    return np.zeros((len(trajectories), resources.max_steps), np.float32)


def used_terms(config: RewardConfig) -> tuple[RewardTerm, RewardTerm]:
    """The process term and the outcome term of a configuration.

    A term that the rewards do not depend on (`use_process` or `use_outcome` is false) is computed all the same, because
    it is logged, unless a judge had to be asked: then zeros, or exact match, take its place.
    """
    process, outcome = PROCESS_REWARDS[config.process], OUTCOME_REWARDS[config.outcome]
    if process.inquiries is not None and not config.use_process:
        process = RewardTerm(_no_rewards)
    if outcome.inquiries is not None and not config.use_outcome:
        outcome = OUTCOME_REWARDS["em"]
    return process, outcome


def needed_resources(config: RewardConfig) -> frozenset[str]:
    """Names of the fields of `Resources` that a configuration's terms need, for whoever builds them."""
    return frozenset(name for term in used_terms(config) for name in term.needs)

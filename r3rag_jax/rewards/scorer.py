"""From trajectories to step rewards: the terms of the configuration, one round of a judge, and the shaping."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from r3rag_jax.config import RewardConfig
from r3rag_jax.errors import ServiceError
from r3rag_jax.rewards.answer import answer_metrics
from r3rag_jax.rewards.base import Resources, next_power_of_two, required
from r3rag_jax.rewards.judge import correctness
from r3rag_jax.rewards.judge.judge import Judge, Verdicts, merge_verdicts
from r3rag_jax.rewards.novelty import shows_new
from r3rag_jax.rewards.shaping import ShapedRewards, shape_rewards
from r3rag_jax.rewards.terms import used_terms
from r3rag_jax.types import Status, Trajectory


@dataclasses.dataclass(frozen=True)
class Scores:
    """The rewards of B trajectories and what they are made of, host arrays; NaN = a judgement that counts has failed.

    `parts` maps outcome, process, format and no_answer to float32 [B]; those of a trajectory add up to its reward.
    """

    rewards: list[np.ndarray]  # float32 [number of steps] per trajectory
    process: np.ndarray  # float32 [B, K], the process term before shaping; 0 for searches that earn nothing
    answers: dict[str, np.ndarray]  # em, f1, cover_em, and acc where a judge decides the outcome: float32 [B]
    parts: dict[str, np.ndarray]
    verdicts: Verdicts | None = None  # of the judge's round, where there was one

    @property
    def is_valid(self) -> np.ndarray:
        """bool [B]: every reward of the trajectory is known."""
        return np.asarray([np.isfinite(rewards_K).all() for rewards_K in self.rewards], bool)


class _Outlines(NamedTuple):
    """What the shaping needs to know of trajectories besides the terms."""

    status_B: np.ndarray  # int32, of `Status`
    step_mask_BK: np.ndarray  # bool, True = the step was taken
    malformed_BK: np.ndarray  # bool, True = the step broke the protocol


def _outlines(trajectories: Sequence[Trajectory], max_steps: int) -> _Outlines:
    """The outlines of trajectories.

    The status says whether the last step is malformed: that of a FORMAT_ERROR is; one that was cut off by the token
    budget of its trajectory, or by the end of its context, did not break the protocol.

    Raises:
        ValueError: a trajectory has more than `max_steps` steps.
    """
    step_mask_BK = np.zeros((len(trajectories), max_steps), bool)
    malformed_BK = np.zeros_like(step_mask_BK)
    for row, trajectory in enumerate(trajectories):
        num_steps = len(trajectory.steps)
        if num_steps > max_steps:
            raise ValueError(f"a trajectory may have {max_steps} steps; got {num_steps}")
        step_mask_BK[row, :num_steps] = True
        malformed_BK[row, :num_steps] = [not step.is_well_formed for step in trajectory.steps]
        if num_steps and trajectory.status != Status.ANSWERED:
            malformed_BK[row, num_steps - 1] = trajectory.status == Status.FORMAT_ERROR
    status_B = np.asarray([trajectory.status for trajectory in trajectories], np.int32)
    return _Outlines(status_B, step_mask_BK, malformed_BK)


class Scorer:
    """Computes the rewards of a configuration."""

    def __init__(self, config: RewardConfig, resources: Resources):
        """`resources` must have those that `needed_resources(config)` names."""
        self._config, self._resources = config, resources
        self._process, self._outcome = used_terms(config)

    def score(self, trajectories: Sequence[Trajectory]) -> Scores:
        """Rewards of every step (arXiv 2505.23794, section 3.3).

        Raises:
            ValueError: a trajectory has more steps than `resources.max_steps`, or a resource is missing.
            ServiceError: the judge fails too often.
        """
        outlines = _outlines(trajectories, self._resources.max_steps)
        answers = answer_metrics(trajectories)
        resources = dataclasses.replace(self._resources, answers=answers)
        process_resources, outcome_resources, verdicts = self._ask(trajectories, resources)
        process_BK = self._process.rewards(trajectories, process_resources)
        if self._config.compat == "r3":
            process_BK = np.where(shows_new(trajectories, self._resources.max_steps), process_BK, np.float32(0))
        correct_B = self._outcome.rewards(trajectories, outcome_resources)
        if self._outcome.inquiries is not None:
            answers = answers | {"acc": correct_B}
        shaped = self._shape(outlines, process_BK, correct_B)
        rewards_BK = np.asarray(shaped.rewards_BK)
        rewards = [rewards_BK[row, : len(trajectory.steps)] for row, trajectory in enumerate(trajectories)]
        parts = {name: np.asarray(x_BK).sum(axis=1)[: len(rewards)] for name, x_BK in shaped.parts_BK.items()}
        return Scores(rewards, process_BK, answers, parts, verdicts)

    def _ask(
        self, trajectories: Sequence[Trajectory], resources: Resources
    ) -> tuple[Resources, Resources, Verdicts | None]:
        """One round of the judge for both terms: the resources of each, with its verdicts, and all verdicts."""
        terms = self._process, self._outcome
        if all(term.inquiries is None for term in terms):
            return resources, resources, None
        judge = required(resources.judge, "a judge")
        inquiries = [[] if term.inquiries is None else term.inquiries(trajectories, resources) for term in terms]
        verdicts = judge.ask([*inquiries[0], *inquiries[1]])
        process, outcome = (
            dataclasses.replace(resources, verdicts_N=values)
            for values in np.split(verdicts.values, [len(inquiries[0])])
        )
        return process, outcome, verdicts

    def _shape(self, outlines: _Outlines, process_BK: np.ndarray, correct_B: np.ndarray) -> ShapedRewards:
        """`shape_rewards` by the configuration; B is padded to a power of two with trajectories without steps."""
        config, padding = self._config, next_power_of_two(len(process_BK)) - len(process_BK)
        arrays = process_BK, correct_B, outlines.status_B, outlines.step_mask_BK, outlines.malformed_BK
        return shape_rewards(
            *(np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in arrays),
            outcome_weight=config.outcome_weight, process_weight=config.process_weight, use_process=config.use_process,
            use_outcome=config.use_outcome, compat=config.compat, factor_correct=config.factor_correct,
            factor_wrong=config.factor_wrong, factor_no_answer=config.factor_no_answer,
            max_process=config.max_process, malformed_reward=config.malformed,
            no_answer_penalty=config.no_answer, clip=config.clip,
        )  # fmt: skip


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of several lists of trajectories, scored one after the other, as those of one list."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    answers = {name: np.concatenate([part.answers[name] for part in parts]) for name in first.answers}
    reward_parts = {name: np.concatenate([part.parts[name] for part in parts]) for name in first.parts}
    verdicts = [part.verdicts for part in parts if part.verdicts is not None]
    return Scores(
        [rewards_K for part in parts for rewards_K in part.rewards],
        np.concatenate([part.process for part in parts]),
        answers,
        reward_parts,
        merge_verdicts(verdicts) if verdicts else None,
    )


def learnable(trajectories: Sequence[Trajectory], scores: Scores) -> tuple[list[Trajectory], Scores]:
    """The trajectories all of whose rewards are known, and their scores.

    A trajectory with a failed judgement is left out as a whole and before any baseline is formed: its return is unknown
    from its first step on, and would be unknown in the baseline of the other samples of its question too.

    Raises:
        ServiceError: none is left.
    """
    kept = np.flatnonzero(scores.is_valid).tolist()
    if not kept and trajectories:
        raise ServiceError(
            f"a judgement failed in each of the {len(trajectories)} trajectories: there is nothing to learn from; "
            "see the failures in the file of judgements (judge.cache)"
        )
    answers, parts = ({k: v[kept] for k, v in table.items()} for table in (scores.answers, scores.parts))
    rewards = [scores.rewards[i] for i in kept]
    return [trajectories[i] for i in kept], Scores(rewards, scores.process[kept], answers, parts, scores.verdicts)


def accuracy(
    trajectories: Sequence[Trajectory], judge: Judge, answers: dict[str, np.ndarray] | None = None
) -> tuple[np.ndarray, Verdicts]:
    """The paper's Acc, as `correctness_rewards`: float32 [B], NaN where the judgement failed; and the verdicts.

    Args:
        answers: `answer_metrics` of the trajectories, computed where it is None.

    Raises:
        ServiceError: the judge fails too often.
    """
    max_steps = max((len(trajectory.steps) for trajectory in trajectories), default=0)
    answers = answer_metrics(trajectories) if answers is None else answers
    resources = Resources(max_steps, judge=judge, answers=answers)
    verdicts = judge.ask(correctness.inquiries(trajectories, resources))
    resources = dataclasses.replace(resources, verdicts_N=verdicts.values)
    return correctness.correctness_rewards(trajectories, resources), verdicts

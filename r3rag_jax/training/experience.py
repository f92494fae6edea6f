"""The scored trajectories of an iteration: rollouts, replacements of questions without a contrast, rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from r3rag_jax.config import Config
from r3rag_jax.data.records import Records
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.rewards.scorer import Scorer, Scores, learnable, merge_scores
from r3rag_jax.rollout.backends import RolloutBackend
from r3rag_jax.rollout.env import EnvFactory
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.rollout.times import RolloutTimes
from r3rag_jax.run.counters import counted
from r3rag_jax.sampler.engine import SamplerWork
from r3rag_jax.training.groups import has_zero_variance, number_groups
from r3rag_jax.training.requests import QuestionDraws
from r3rag_jax.types import Question, Trajectory

FAILED_SEARCH = "retrieval.endpoint failed"  # counted by clients/endpoint.py


@dataclasses.dataclass(frozen=True)
class Experience:
    """Scored trajectories; all samples of a question are in it."""

    trajectories: list[Trajectory]
    scores: Scores
    zero_variance: np.ndarray  # bool [N], all known rewards of its question are equal; False where a reward is unknown

    def num_useful_draws(self, num_samples: int) -> int:
        """Draws, of `num_samples` trajectories each, of questions whose samples did not all earn the same."""
        is_useful = self.scores.is_valid & ~self.zero_variance
        useful = [self.trajectories[i] for i in np.flatnonzero(is_useful)]
        return len({(trajectory.question.id, trajectory.sample_index // num_samples) for trajectory in useful})

    def learnable(self) -> Experience:
        """The trajectories whose rewards are all known; see `rewards.scorer.learnable`.

        Raises:
            UserError: there is none.
        """
        trajectories, scores = learnable(self.trajectories, self.scores)
        return Experience(trajectories, scores, self.zero_variance[self.scores.is_valid])


def score_experience(trajectories: list[Trajectory], scorer: Scorer, *, totals: bool) -> Experience:
    """Score trajectories; `totals` as of `has_zero_variance`.

    Raises:
        UserError: the judge fails too often.
    """
    scores = scorer.score(trajectories)
    valid = np.flatnonzero(scores.is_valid)
    groups = number_groups([trajectories[i] for i in valid])
    zero_variance = np.zeros(len(trajectories), bool)
    zero_variance[valid] = has_zero_variance([scores.rewards[i] for i in valid], groups, totals=totals)
    return Experience(trajectories, scores, zero_variance)


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Trajectories of an iteration. The last round is not scored: nothing depends on it while sampling."""

    scored: tuple[Experience, ...]  # rounds whose zero-variance questions have been replaced by the next round
    last: list[Trajectory]
    metrics: dict[str, float]  # seconds of sampling by what they were used for, searches, tokens per second
    bytes_read: float  # from a device's memory while decoding

    def score(self, scorer: Scorer, *, totals: bool) -> Experience:
        """All rounds together; `totals` as of `has_zero_variance`.

        Raises:
            UserError: the judge fails too often.
        """
        rounds = [*self.scored, score_experience(self.last, scorer, totals=totals)] if self.last else [*self.scored]
        return Experience(
            [trajectory for one in rounds for trajectory in one.trajectories],
            merge_scores([one.scores for one in rounds]),
            np.concatenate([one.zero_variance for one in rounds]),
        )


class IterationSampler:
    """Samples the trajectories of RL iterations, `rl.max_resamples` rounds of replacements included."""

    def __init__(
        self,
        config: Config,
        questions: Records[Question],
        env_factory: EnvFactory,
        retriever: Retriever,
        scorer: Scorer,
        work: Callable[[], SamplerWork],
    ):
        """`work`: of the engine that samples, so far."""
        self._config, self._draws = config, QuestionDraws(config, questions)
        self._env_factory, self._retriever, self._scorer = env_factory, retriever, scorer
        self._work = work

    def run(self, iteration: int, backend: RolloutBackend) -> Rollouts:
        """Roll out the questions of an iteration.

        In a further round, other questions replace those whose samples all earned the same.

        Raises:
            RetrievalError: a search failed.
            UserError: the judge fails too often.
        """
        config, totals = self._config, self._config.rl.returns == "total"
        scored: list[Experience] = []
        times, work, failed = RolloutTimes(), self._work(), counted(FAILED_SEARCH)
        requests = self._draws.requests(iteration)
        for round in range(1, config.rl.max_resamples + 1):
            trajectories = self._rollout(backend, requests, times)
            with times.watch.measure("score"):
                scored.append(score_experience(trajectories, self._scorer, totals=totals))
            num_useful = sum(one.num_useful_draws(config.rollout.samples) for one in scored)
            num_missing = config.rl.questions - num_useful
            used_ids = {trajectory.question.id for one in scored for trajectory in one.trajectories}
            requests = self._draws.replacements(iteration, round, num_missing, used_ids)
            if not requests:
                break
        last = self._rollout(backend, requests, times) if requests else []
        done = self._work()
        metrics = times.metrics | {"search_failures": float(counted(FAILED_SEARCH) - failed)}
        if metrics["decode_s"] > 0:
            metrics["decoded_per_s"] = (done.sampled - work.sampled) / metrics["decode_s"]
        return Rollouts(tuple(scored), last, metrics, done.bytes_read - work.bytes_read)

    def _rollout(
        self, backend: RolloutBackend, requests: Sequence[RolloutRequest], times: RolloutTimes
    ) -> list[Trajectory]:
        overlap = self._config.rollout.search_overlap
        return rollout(
            backend, self._env_factory, self._retriever, requests, search_overlap=overlap, times=times
        )  # fmt: skip

"""Process reward `gain`: what a search's passages tell their reader of the gold answer, and win the question's samples.

    gain_k  = max(0, told_k + won_k) / 2

`told_k` is how much of the gold answer's surprise reading the passages of search k removes, as the reference policy
reads, for which the answer is teacher-forced after every sentence of the next analysis:

    surprisal_k = - max over gold answers a, and over beginnings r of step k + 1's analysis, of log p(a | context_k, r)
    told_k      = max(0, min of surprisal_0 … surprisal_(k-1), minus surprisal_k) / surprisal_0

`context_k` ends with the passages of step k, and `context_0` is the question alone: passages count once the policy has
read them. An analysis may say what is known and go on to what is missing, hence its beginnings. Those of a trajectory
add up to at most 1, whatever it repeats: only what falls below the least surprisal so far counts, as in potential-based
shaping (Ng et al. 1999). The reference policy, which RL does not move, is the yardstick: the policy cannot raise its
reward by what it comes to believe.

A passage that only names the next thing to look up tells its reader nothing of the answer. What it is worth shows in
the samples of the question, each worth v = (sum of its told_k + 1 if its answer is right) / 2:

    won_k = mean v of the samples that read the passage - mean v of those that did not (0 if all did)

for the best of the passages that search k shows for the first time. A passage without a bearing on the answer wins
nothing on average, for samples do not fare better by reading it; a search that shows nothing new wins nothing, and
what no well-formed step follows was never read.

Turn-level information gain for search agents: IGPO (arXiv 2510.14967: differences of exp of the mean log-probability,
by the policy itself), IG-Search (arXiv 2604.15148: against random passages). Comparing samples that passed the same
point: GiGPO (arXiv 2505.10978), there for returns from equal states.

Shape suffixes: B trajectories, K steps.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from r3rag_jax.rewards.answer import answer_metrics
from r3rag_jax.rewards.base import Resources, next_power_of_two, required
from r3rag_jax.rewards.novelty import new_passages
from r3rag_jax.text.transcript import Codec, Transcript, forced_sample
from r3rag_jax.types import Sample, Step, Trajectory

MAX_SENTENCES = 4  # of an analysis after which the answer is tried; the whole analysis always is
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def gain_rewards(trajectories: Sequence[Trajectory], resources: Resources) -> np.ndarray:
    """The gain of each search, float32 [B, K] in [0, 1]; NaN where a log-probability is not finite.

    Trajectories with one question are its samples.

    Raises:
        ValueError: there is no likelihood.
    """
    likelihood = required(resources.likelihood, "a likelihood")
    num, shape = len(trajectories), (next_power_of_two(len(trajectories)), resources.max_steps + 1)
    surprisal_BJ = np.full(shape, np.inf, np.float32)
    forced = [list(forced_answers(likelihood.codec, trajectory)) for trajectory in trajectories]
    found = likelihood([[sample for _, sample in one] for one in forced])
    for row, (one, logprobs) in enumerate(zip(forced, found, strict=True)):
        for (level, _), logprobs_T in zip(one, logprobs, strict=True):
            surprisal_BJ[row, level] = np.minimum(surprisal_BJ[row, level], -logprobs_T.sum())
    told_BK = np.asarray(information_gain(surprisal_BJ))[:num]
    answers = answer_metrics(trajectories) if resources.answers is None else resources.answers
    won_BK = reading_contrast(trajectories, (told_BK.sum(axis=1) + answers["em"]) / 2, resources.max_steps)
    return np.maximum(told_BK + won_BK, np.float32(0)) / 2


def forced_answers(codec: Codec, trajectory: Trajectory) -> Iterator[tuple[int, Sample]]:
    """(number of searches before it, sample) for each gold answer after each beginning of each step's analysis.

    The tokens of a sample's loss_mask are the answer's, with what closes it.
    """
    transcript = Transcript(codec, trajectory.question.question)
    for level, step in enumerate(trajectory.steps):
        if not step.is_well_formed:
            return
        for analysis in beginnings(step.analysis):
            for answer in trajectory.question.golden_answers:
                yield level, forced_sample(codec, transcript.context, Step(analysis, answer=answer), level + 1)
        if step.query is None:
            return
        transcript.write(codec.step_ids(step, level + 1))
        transcript.add_passages(step.passages)


def beginnings(analysis: str) -> list[str]:
    """The first sentence, the first two, … of an analysis, and all of it."""
    sentences = _SENTENCE_END.split(analysis)
    counts = [*range(1, min(len(sentences), MAX_SENTENCES)), len(sentences)]
    return [" ".join(sentences[:count]) for count in counts]


def reading_contrast(trajectories: Sequence[Trajectory], value_B: np.ndarray, max_steps: int) -> np.ndarray:
    """How much more the samples of a question are worth that read a search's new passage than those that did not.

    Args:
        value_B: float [B], what a trajectory is worth; one that is NaN is left out of the means.

    Returns:
        float32 [B, K], of the best new passage of each search; 0 for a search that shows none, or is not read.
    """
    samples = defaultdict(list)
    for row, trajectory in enumerate(trajectories):
        samples[trajectory.question.id].append(row)
    read = [read_passages(trajectory) for trajectory in trajectories]
    contrast_BK = np.zeros((len(trajectories), max_steps), np.float32)
    for rows in samples.values():
        values = value_B[rows]
        known = np.isfinite(values)
        has = {
            id: np.asarray([any(id in ids for ids in read[row]) for row in rows])
            for id in {id for row in rows for ids in read[row] for id in ids}
        }
        won = {id: _mean(values[known & had]) - _mean(values[known & ~had], 0.0) for id, had in has.items()}
        for row in rows:
            for k, ids in enumerate(read[row]):
                if ids:
                    contrast_BK[row, k] = np.max([won[id] for id in ids])
    return contrast_BK


def _mean(values: np.ndarray, of_none: float = np.nan) -> float:
    return float(values.mean()) if len(values) else of_none


def read_passages(trajectory: Trajectory) -> list[list[str]]:
    """For each step the ids of the passages that it shows for the first time, if a well-formed step follows it."""
    follows = [step.is_well_formed for step in trajectory.steps[1:]] + [False]
    new = new_passages(trajectory)
    return [[p.id for p in passages] if is_read else [] for passages, is_read in zip(new, follows, strict=True)]


@jax.jit
def information_gain(surprisal_BJ: jax.Array) -> jax.Array:
    """The share of the first surprisal that each search removes below the least one before it.

    Args:
        surprisal_BJ: float [B, K + 1], nats, at least 0; entry 0 before any search, entry k after the k-th; infinite
            where it was not measured.

    Returns:
        float32 [B, K] in [0, 1]; a row adds up to at most 1. NaN where the surprisal is, and after it.
    """
    surprisal_BJ = surprisal_BJ.astype(jnp.float32)
    least_BJ = lax.cummin(surprisal_BJ, axis=1)
    removed_BK = jnp.where(jnp.isinf(surprisal_BJ[:, 1:]), 0.0, least_BJ[:, :-1] - least_BJ[:, 1:])
    first_B1 = surprisal_BJ[:, :1]
    return removed_BK / jnp.where(first_B1 > 0, first_B1, 1.0)  # nothing can be removed from 0

"""Process reward `gain`: how much of the gold answer's surprise a search removes, as the reference policy reads.

    surprisal_k = - max over gold answers a, and over beginnings r of step k + 1's analysis, of log p(a | context_k, r)
    gain_k      = max(0, min of surprisal_0 … surprisal_(k-1), minus surprisal_k) / surprisal_0

`context_k` ends with the passages of step k, and `context_0` is the question alone: passages count once the policy has
read them, which it does in the next analysis. The answer is teacher-forced after every sentence of that analysis, for
an analysis may say what is known and go on to what is missing. Passages that no well-formed step follows were never
read and earn 0.

The gains of a trajectory add up to at most 1, whatever it repeats: only what falls below the least surprisal so far
counts, as in potential-based shaping (Ng et al. 1999). The reference policy, which RL does not move, is the yardstick:
the policy cannot raise its reward by what it comes to believe.

Turn-level information gain for search agents: IGPO (arXiv 2510.14967: differences of exp of the mean log-probability,
by the policy itself), IG-Search (arXiv 2604.15148: against random passages). As there, a passage is paid for what it
says of the *answer*: one that only names the next thing to look up earns little by itself, and is credited through
returns (`rl.step_discount`).

Shape suffixes: B trajectories, K steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from r3rag_jax.rewards.base import Resources, next_power_of_two, required
from r3rag_jax.text.transcript import Codec, Transcript, forced_sample
from r3rag_jax.types import Sample, Step, Trajectory

MAX_SENTENCES = 4  # of an analysis after which the answer is tried; the whole analysis always is
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def gain_rewards(trajectories: Sequence[Trajectory], resources: Resources) -> np.ndarray:
    """`information_gain` of the trajectories, float32 [B, K]; NaN where a log-probability is not finite.

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
    return np.asarray(information_gain(surprisal_BJ))[:num]


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

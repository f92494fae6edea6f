"""What tests of the trainer share: trajectories of random tokens, and a whole iteration on them."""

from __future__ import annotations

import numpy as np

from r3rag_jax.components import Components
from r3rag_jax.rewards.scorer import Scores
from r3rag_jax.training.experience import Experience
from r3rag_jax.training.groups import has_zero_variance, number_groups
from r3rag_jax.training.trainer import RLTrainer
from r3rag_jax.types import Question, Sample, Status, Step, Trajectory

NUM_PROMPT, STEP_TOKENS = 6, 5


def trajectory(components: Components, question: str, index: int, num_steps: int) -> Trajectory:
    """A trajectory of random tokens in the layout of the run's protocol, as a sampler would return it."""
    rng = np.random.default_rng((ord(question), index))
    rows = [[-1] * NUM_PROMPT + [step] * STEP_TOKENS for step in range(num_steps)]
    if components.codec.protocol.is_one_sequence:
        rows = [[id for row in rows for id in row]]
    samples = []
    for row in rows:
        steps = np.asarray(row, np.int32)
        logprobs = np.where(steps >= 0, -rng.uniform(5, 9, len(row)), 0).astype(np.float32)
        samples.append(Sample(rng.integers(0, 1000, len(row)).astype(np.int32), steps >= 0, logprobs, steps))
    taken = (Step("a", query="q"),) * (num_steps - 1) + (Step("a", answer="b"),)
    return Trajectory(Question(question, "?", ("b",)), taken, Status.ANSWERED, tuple(samples), index)


def trainer_of(components: Components) -> RLTrainer:
    """A new trainer, which resumes from the run's checkpoint where there is one."""
    return RLTrainer(
        components.config, components.policy, components.mesh, components.run, components.console,
        shares_prefixes=components.shares_prefixes, provenance=components.provenance("rl"),
    )  # fmt: skip


def scores_of(rewards: list[list[float]]) -> Scores:
    """Scores of trajectories with these rewards of their steps."""
    return Scores([np.asarray(r, np.float32) for r in rewards], np.zeros((len(rewards), 3), np.float32), {}, {})


def iterate(trainer: RLTrainer, trajectories: list[Trajectory], scores: Scores) -> dict[str, float]:
    """One iteration on scored trajectories; returns its metrics."""
    totals = trainer._config.rl.returns == "total"
    zero_variance = has_zero_variance(scores.rewards, number_groups(trajectories), totals=totals)
    packed = trainer.pack(Experience(trajectories, scores, zero_variance))
    return trainer.update(trainer.targets(packed))

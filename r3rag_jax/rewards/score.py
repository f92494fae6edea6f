"""Trajectories to step rewards: the host turns them into padded arrays, jitted functions do the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from r3rag_jax.config import RewardConfig
from r3rag_jax.retrieval.base import Encoder
from r3rag_jax.rewards.answer import answer_scores, encode_answers
from r3rag_jax.rewards.combine import shape_rewards
from r3rag_jax.rewards.relevance import embedding_similarity, gold_recall
from r3rag_jax.types import Status, Trajectory


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a batch of trajectories earned; all host arrays."""

    rewards: list[np.ndarray]  # float32 [T] per trajectory
    process: np.ndarray  # float32 [B, T]
    answers: dict[str, np.ndarray]  # em, f1, cover_em: float32 [B]


def score(trajectories: Sequence[Trajectory], config: RewardConfig, encoder: Encoder, *, max_steps: int) -> Scores:
    """R3 rewards of every step (arXiv 2505.23794, section 3.3).

    Raises:
        ValueError: a trajectory has more than `max_steps` steps.
    """
    num = len(trajectories)
    step_mask = np.zeros((_bucket(num), max_steps), bool)
    malformed = np.zeros_like(step_mask)
    status = np.zeros(_bucket(num), np.int32)
    for row, trajectory in enumerate(trajectories):
        if len(trajectory.steps) > max_steps:
            raise ValueError(f"a trajectory may have {max_steps} steps; got {len(trajectory.steps)}")
        step_mask[row, : len(trajectory.steps)] = True
        malformed[row, : len(trajectory.steps)] = [not step.is_well_formed for step in trajectory.steps]
        if trajectory.status == Status.NO_ANSWER and trajectory.steps:
            malformed[row, len(trajectory.steps) - 1] = False  # cut off by the budget of all steps: it broke no rule
        status[row] = trajectory.status
    answers = answers_of(trajectories)
    correct = np.pad(answers[config.outcome], (0, _bucket(num) - num))
    process = _process(trajectories, config, encoder, step_mask)
    rewards = shape_rewards(
        process, correct, status, step_mask, malformed,
        outcome_weight=config.outcome_weight, use_process=config.use_process, use_outcome=config.use_outcome,
        compat=config.compat, factor_correct=config.factor_correct, factor_wrong=config.factor_wrong,
        factor_no_answer=config.factor_no_answer, malformed_reward=config.malformed,
        no_answer_penalty=config.no_answer, clip=config.clip,
    )  # fmt: skip
    table = np.asarray(rewards)
    per_trajectory = [table[row, : len(t.steps)] for row, t in enumerate(trajectories)]
    return Scores(per_trajectory, np.asarray(process)[:num], answers)


def answers_of(trajectories: Sequence[Trajectory]) -> dict[str, np.ndarray]:
    """em, f1, cover_em of the final answers over all gold answers, float32 [B]; 0 without an answer."""
    num = len(trajectories)
    padding = _bucket(num) - num
    predictions = [t.answer for t in trajectories] + [None] * padding
    golds: list[Sequence[str]] = [t.question.golden_answers for t in trajectories]
    scores = answer_scores(encode_answers(predictions, golds + [("",)] * padding))
    return {name: np.asarray(values)[:num] for name, values in scores.items()}


def _process(
    trajectories: Sequence[Trajectory], config: RewardConfig, encoder: Encoder, step_mask: np.ndarray
) -> np.ndarray:
    """float32 [B, T], the relevance of what each step retrieved."""
    steps = [(row, k, step) for row, t in enumerate(trajectories) for k, step in enumerate(t.steps)]
    width = max([len(step.passages) for _, _, step in steps], default=1) or 1
    if config.process == "gold":
        golds = [t.question.supporting_ids for t in trajectories]
        numbers: dict[str, int] = {}
        retrieved = np.full((*step_mask.shape, _bucket(width)), -1, np.int32)
        gold = np.full((len(step_mask), _bucket(max(map(len, golds), default=1) or 1)), -1, np.int32)
        for row, k, step in steps:
            for i, passage in enumerate(step.passages):
                retrieved[row, k, i] = numbers.setdefault(passage.id, len(numbers))
        for row, ids in enumerate(golds):
            gold[row, : len(ids)] = [numbers.setdefault(i, len(numbers)) for i in ids]
        return np.asarray(gold_recall(retrieved, gold, step_mask))
    queries = np.zeros((*step_mask.shape, encoder.dim), np.float32)
    passages = np.zeros((*step_mask.shape, _bucket(width), encoder.dim), np.float32)
    has_passage = np.zeros((*step_mask.shape, _bucket(width)), bool)
    asked = [(row, k, step.query, step.passages) for row, k, step in steps if step.query is not None and step.passages]
    # Two calls of the encoder in all: a batch on a device costs little more than a text.
    query_rows = {text: i for i, text in enumerate(dict.fromkeys(query for _, _, query, _ in asked))}
    passage_rows = {text: i for i, text in enumerate(dict.fromkeys(p.contents for *_, found in asked for p in found))}
    query_vectors = encoder.encode(list(query_rows))
    passage_vectors = encoder.encode(list(passage_rows), kind=encoder.cosine_kind)
    for row, k, query, found in asked:
        queries[row, k] = query_vectors[query_rows[query]]
        passages[row, k, : len(found)] = passage_vectors[[passage_rows[p.contents] for p in found]]
        has_passage[row, k, : len(found)] = True
    return np.asarray(embedding_similarity(queries, passages, has_passage))


def _bucket(size: int) -> int:
    """The next power of two, so that few shapes are compiled."""
    return 1 << max(0, size - 1).bit_length()

"""Trajectories to step rewards: the host turns them into padded arrays, jitted functions do the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from r3rag_jax.config import RewardConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Encoder
from r3rag_jax.rewards.answer import answer_scores, encode_answers
from r3rag_jax.rewards.judge.judge import Judge, Verdicts
from r3rag_jax.rewards.relevance import embedding_similarity, gold_recall
from r3rag_jax.rewards.shaping import shape_rewards
from r3rag_jax.types import Status, Trajectory


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a batch of trajectories earned; all host arrays. NaN: it depends on a judgement that failed."""

    rewards: list[np.ndarray]  # float32 [T] per trajectory
    process: np.ndarray  # float32 [B, T]
    answers: dict[str, np.ndarray]  # em, f1, cover_em; acc where a judge has a say: float32 [B]
    parts: dict[str, np.ndarray]  # outcome, process, format, no_answer: float32 [B], which add up to the reward
    verdicts: Verdicts | None = None  # what a judge was asked

    @property
    def is_valid(self) -> np.ndarray:
        """bool [B]: every reward of the trajectory is known."""
        return np.asarray([np.isfinite(rewards_T).all() for rewards_T in self.rewards], bool)


def score(
    trajectories: Sequence[Trajectory],
    config: RewardConfig,
    encoder: Encoder,
    *,
    max_steps: int,
    judge: Judge | None = None,
) -> Scores:
    """R3 rewards of every step (arXiv 2505.23794, section 3.3). `judge`: where the configuration asks for one.

    Raises:
        ValueError: a trajectory has more than `max_steps` steps.
        UserError: the judge fails too often.
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
    process = _process(trajectories, config, encoder, step_mask)
    verdicts = None
    if config.needs_judge:
        if judge is None:
            raise ValueError("rewards of a judge need a judge; got none")
        process, acc, verdicts = _judged(trajectories, config, judge, process, answers["em"])
        answers |= {} if acc is None else {"acc": acc}
    outcome = "acc" if config.outcome == "judge" and config.use_outcome else config.outcome
    correct = np.pad(answers.get(outcome, answers["em"]), (0, _bucket(num) - num))
    rewards = shape_rewards(
        process, correct, status, step_mask, malformed,
        outcome_weight=config.outcome_weight, process_weight=config.process_weight, use_process=config.use_process,
        use_outcome=config.use_outcome, compat=config.compat, factor_correct=config.factor_correct,
        factor_wrong=config.factor_wrong, factor_no_answer=config.factor_no_answer, malformed_reward=config.malformed,
        no_answer_penalty=config.no_answer, clip=config.clip,
    )  # fmt: skip
    table = np.asarray(rewards)
    per_trajectory = [table[row, : len(t.steps)] for row, t in enumerate(trajectories)]
    is_step = _parts(status, step_mask, malformed, config)
    parts = {name: np.where(is_one, table, 0).sum(axis=1)[:num] for name, is_one in is_step.items()}
    return Scores(per_trajectory, np.asarray(process)[:num], answers, parts, verdicts)


def _parts(
    status: np.ndarray, step_mask: np.ndarray, malformed: np.ndarray, config: RewardConfig
) -> dict[str, np.ndarray]:
    """Part of the shaping -> bool [B, T], the steps that earn it; see the table of `shape_rewards`."""
    is_formed = step_mask & ~malformed
    is_last = is_formed & (np.cumsum(step_mask[:, ::-1], axis=1)[:, ::-1] == 1)
    is_outcome = is_last & (status == Status.ANSWERED)[:, None]
    has_penalty = config.use_outcome and config.compat == "r3"
    is_no_answer = is_last & (status == Status.NO_ANSWER)[:, None] & has_penalty
    is_process = is_formed & ~is_outcome & ~is_no_answer
    return {
        "outcome": is_outcome,
        "process": is_process,
        "format": step_mask & malformed,
        "no_answer": is_no_answer,
    }


def learnable(trajectories: Sequence[Trajectory], scores: Scores) -> tuple[list[Trajectory], Scores]:
    """The trajectories all of whose rewards are known, and their scores.

    One with a failed judgement is left out whole, before any baseline is formed: its return is unknown from its first
    step on, and so is what it would have told about the others of its question.

    Raises:
        UserError: none is left.
    """
    kept = np.flatnonzero(scores.is_valid).tolist()
    if not kept and trajectories:
        raise UserError(
            f"a judgement failed in each of the {len(trajectories)} trajectories: there is nothing to learn from; "
            "see the failures in the file of judgements (judge.cache)"
        )
    answers, parts = ({k: v[kept] for k, v in table.items()} for table in (scores.answers, scores.parts))
    rewards = [scores.rewards[i] for i in kept]
    return [trajectories[i] for i in kept], Scores(rewards, scores.process[kept], answers, parts, scores.verdicts)


def accuracy(trajectories: Sequence[Trajectory], judge: Judge) -> tuple[np.ndarray, Verdicts]:
    """The paper's Acc: 1 for an exact match, else what the judge says of an answer; 0 without one, NaN = failed."""
    em = answers_of(trajectories)["em"]
    asked = _unmatched(trajectories, em)
    verdicts = judge.ask([judge.correctness(trajectories[i].question, trajectories[i].answer or "") for i in asked])
    em[asked] = verdicts.values
    return em, verdicts


def _unmatched(trajectories: Sequence[Trajectory], em: np.ndarray) -> list[int]:
    """Those with an answer of which exact match does not already say that it is right."""
    return [i for i, t in enumerate(trajectories) if t.answer is not None and em[i] < 1]


def _judged(
    trajectories: Sequence[Trajectory], config: RewardConfig, judge: Judge, process: np.ndarray, em: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, Verdicts]:
    """One round for both kinds of judgement: process [B, T], accuracy [B] (None where not asked), the verdicts."""
    steps, answers = [], []
    if config.use_process and config.process == "judge":
        steps = [(i, k) for i, t in enumerate(trajectories) for k, step in enumerate(t.steps) if step.passages]
    if config.use_outcome and config.outcome == "judge":
        answers = _unmatched(trajectories, em)
    inquiries = [judge.relevance(trajectories[i].question, trajectories[i].steps[k]) for i, k in steps]
    inquiries += [judge.correctness(trajectories[i].question, trajectories[i].answer or "") for i in answers]
    verdicts = judge.ask(inquiries)
    process, acc = process.copy(), em.copy()
    for (i, k), value in zip(steps, verdicts.values, strict=False):
        process[i, k] = value
    acc[answers] = verdicts.values[len(steps) :]
    return process, acc if config.use_outcome and config.outcome == "judge" else None, verdicts


def answers_of(trajectories: Sequence[Trajectory]) -> dict[str, np.ndarray]:
    """em, f1, cover_em of the final answers over all gold answers, float32 [B]; 0 without an answer."""
    num = len(trajectories)
    padding = _bucket(num) - num
    predictions = [t.answer for t in trajectories] + [None] * padding
    golds: list[Sequence[str]] = [t.question.golden_answers for t in trajectories]
    scores = answer_scores(encode_answers(predictions, golds + [("",)] * padding))
    return {name: np.array(values)[:num] for name, values in scores.items()}


def _process(
    trajectories: Sequence[Trajectory], config: RewardConfig, encoder: Encoder, step_mask: np.ndarray
) -> np.ndarray:
    """float32 [B, T], the relevance of what each step retrieved, as far as no judge is needed."""
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
    if config.process == "judge":
        return np.zeros(step_mask.shape, np.float32)  # a step that brought nothing is not shown to the judge
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

"""Evaluation: questions to EM, F1, cover-EM and what they cost, for the trained policy and for baselines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.rewards.answer import answer_metrics
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.rewards.scorer import accuracy
from r3rag_jax.rollout.backends import RolloutBackend
from r3rag_jax.rollout.env import EnvFactory
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import OnDone, rollout
from r3rag_jax.types import Question, Status, Trajectory

TITLES = {
    "closed_book": "Closed book",
    "oneshot_rag": "One-shot RAG",
    "cold_start": "Cold start",
    "r3rag": "R3-RAG",
}


def greedy_rollouts(
    backend: RolloutBackend,
    env_factory: EnvFactory,
    retriever: Retriever,
    questions: Sequence[Question],
    *,
    search_overlap: int = 0,
    on_done: OnDone | None = None,
) -> list[Trajectory]:
    """Return one greedy trajectory per question; see `rollout`."""
    requests = [RolloutRequest(question) for question in questions]
    return rollout(backend, env_factory, retriever, requests, search_overlap=search_overlap, on_done=on_done)


def measure(trajectories: Sequence[Trajectory], acc: np.ndarray | None = None) -> dict[str, Any]:
    """One row of a table; percentages are 0..100.

    `acc`: `rewards.scorer.accuracy` of the trajectories, where a judge was asked; those it failed on are counted apart.
    """
    scores = {name: float(100 * values.mean()) for name, values in answer_metrics(trajectories).items()}
    correct = round(scores["em"] / 100 * len(trajectories))
    found = [
        len(set(t.question.supporting_ids) & set(t.retrieved_ids)) / len(set(t.question.supporting_ids))
        for t in trajectories
        if t.question.supporting_ids
    ]
    tokens = sum(t.num_policy_tokens for t in trajectories)
    return {
        "num": len(trajectories),
        **scores,
        **({} if acc is None else _judged(acc)),
        "retrievals": float(np.mean([t.num_retrievals for t in trajectories])),
        "support_found": 100 * float(np.mean(found)) if found else None,
        "tokens_per_correct": tokens / correct if correct else None,
        "no_answer": 100 * float(np.mean([t.status != Status.ANSWERED for t in trajectories])),
    }


def _judged(acc: np.ndarray) -> dict[str, Any]:
    known = acc[np.isfinite(acc)]
    return {"acc": 100 * float(known.mean()) if len(known) else None, "judge_failures": len(acc) - len(known)}


def summarise(
    system: str, trajectories: Sequence[Trajectory], fingerprint: dict[str, Any], judge: Judge | None = None
) -> dict[str, Any]:
    """The content of `eval/<system>.json`: metrics of all questions and of each group.

    Raises:
        UserError: the judge fails too often.
    """
    acc = None if judge is None else accuracy(trajectories, judge)[0]
    groups: dict[str, list[int]] = {"all": list(range(len(trajectories)))}
    for place, trajectory in enumerate(trajectories):
        metadata = trajectory.question.metadata
        names = [str(metadata["type"])] if "type" in metadata else []
        if "unseen" in metadata:
            names.append("unseen" if metadata["unseen"] else "seen")
        for name in names:
            groups.setdefault(name, []).append(place)
    return {
        "system": system,
        "title": TITLES.get(system, system),
        "num_questions": len(trajectories),
        "fingerprint": fingerprint,
        "groups": {
            name: measure([trajectories[i] for i in places], None if acc is None else acc[places])
            for name, places in groups.items()
        },
    }


def fingerprint(questions: Iterable[Question], **parts: Any) -> dict[str, Any]:
    """What two evaluations must share to be comparable: the questions and the given parts."""
    lines = "\n".join(f"{q.id}\t{q.question}\t{q.golden_answers}" for q in questions)
    return {**parts, "questions": hashlib.sha256(lines.encode()).hexdigest()[:16]}

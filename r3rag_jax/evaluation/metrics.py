"""The metrics of a set of trajectories: one row of a results table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from r3rag_jax.rewards.answer import answer_metrics
from r3rag_jax.types import Status, Trajectory


def measure(trajectories: Sequence[Trajectory], acc: np.ndarray | None = None) -> dict[str, Any]:
    """Return one row of a results table; shares are percentages from 0 to 100.

    Args:
        acc: float32 [B], what `accuracy` returned for the trajectories, where a judge was asked. The unknown ones
            (NaN) are counted apart.
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
        "context_full": 100 * float(np.mean([t.status == Status.CONTEXT_FULL for t in trajectories])),
    }


def _judged(acc: np.ndarray) -> dict[str, Any]:
    known = acc[np.isfinite(acc)]
    return {"acc": 100 * float(known.mean()) if len(known) else None, "judge_failures": len(acc) - len(known)}

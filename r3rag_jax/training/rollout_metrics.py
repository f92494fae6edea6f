"""Metrics of an iteration's trajectories."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r3rag_jax.rewards.novelty import normalize_query
from r3rag_jax.rewards.scorer import Scores
from r3rag_jax.types import Status, Trajectory


def rollout_metrics(trajectories: Sequence[Trajectory], scores: Scores) -> dict[str, float]:
    """Metrics of all trajectories of an iteration; means of rewards are over those that are known."""
    status = np.asarray([t.status for t in trajectories])
    is_valid = scores.is_valid
    parts = {f"reward_{name}": values[is_valid] for name, values in scores.parts.items()}
    retrieving = [
        [i, k] for i, t in enumerate(trajectories) for k, step in enumerate(t.steps) if step.query is not None
    ]
    parts["relevance"] = scores.process[tuple(np.reshape(retrieving, (-1, 2)).astype(int).T)]
    parts |= {"acc": scores.answers["acc"]} if "acc" in scores.answers else {}
    return {
        "reward": _known_mean(np.asarray([r.sum() for r in scores.rewards])),
        **{name: _known_mean(values) for name, values in parts.items()},
        **(scores.verdicts.metrics | {"left_out": 1 - is_valid.mean()} if scores.verdicts is not None else {}),
        "em": float(scores.answers["em"].mean()),
        "f1": float(scores.answers["f1"].mean()),
        "no_answer_rate": float(np.mean(status == Status.NO_ANSWER)),
        "context_full_rate": float(np.mean(status == Status.CONTEXT_FULL)),
        "format_error_rate": float(np.mean(status == Status.FORMAT_ERROR)),
        "repeated_query_rate": repeated_query_rate(trajectories),
        "trajectory_tokens": float(np.mean([t.num_policy_tokens for t in trajectories])),
        "mean_retrievals": float(np.mean([t.num_retrievals for t in trajectories])),
    }


def repeated_query_rate(trajectories: Sequence[Trajectory]) -> float:
    """Share of queries that occur earlier in the same trajectory (`normalize_query`); 0 without queries."""
    queries_of = [[normalize_query(s.query) for s in t.steps if s.query is not None] for t in trajectories]
    num_queries = sum(map(len, queries_of))
    return (num_queries - sum(len(set(queries)) for queries in queries_of)) / max(1, num_queries)


def _known_mean(values: np.ndarray) -> float:
    """Mean of the finite values (NaN: a judgement failed); 0 if there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else 0.0

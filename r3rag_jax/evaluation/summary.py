"""The content of `eval/<name>.json`: metrics of all questions and of each group, with intervals, from trajectories."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from r3rag_jax.config import EvalConfig
from r3rag_jax.evaluation.fingerprint import Facts
from r3rag_jax.evaluation.groups import ALL, groups_of, hops_group
from r3rag_jax.evaluation.metrics import RATIOS, Values, measure_each, metric_of, of_questions, ratio, summary
from r3rag_jax.evaluation.sampled import sampled_values
from r3rag_jax.evaluation.statistics import Interval, Statistic, bootstrap, weighted_mean, weighted_ratio, wilson
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.rewards.answer import answer_metrics
from r3rag_jax.rewards.judge.candidates import candidate_em
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.rewards.scorer import accuracy
from r3rag_jax.types import Question, Trajectory


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an evaluation found.

    Fields:
        result: the content of `eval/<name>.json`.
        rows: one per question, in order: its id, its groups with that of its hops, and the values that `result` has the
            means of, None = unknown.
    """

    result: dict[str, Any]
    rows: list[dict[str, Any]]


def summarise(
    name: str,
    trajectories: Sequence[Trajectory],
    fingerprint: Facts,
    config: EvalConfig | None = None,
    judge: Judge | None = None,
) -> Measured:
    """Measure the trajectories of an evaluation.

    Args:
        name: a key of `SYSTEMS`, or what the user calls the evaluation.
        trajectories: `config.samples` of each question, next to each other.
        judge: is asked for what `config` wants of it.

    Raises:
        UserError: the judge fails too often.
    """
    config = EvalConfig() if config is None else config
    num = config.samples
    answers = answer_metrics(trajectories)
    judged = _judged(trajectories, answers["em"], config, judge)
    values = measure_each(trajectories, config.recall_k, judged, answers)
    per_question = of_questions(values, num)
    if num > 1:
        per_question |= sampled_values(trajectories, values["em"], num)
    questions = [trajectory.question for trajectory in trajectories[::num]]
    groups: dict[str, list[int]] = {ALL: list(range(len(questions)))}
    for index, question in enumerate(questions):
        for group in groups_of(question):
            groups.setdefault(group, []).append(index)
    result = {
        "system": name,
        "title": SYSTEMS[name].title if name in SYSTEMS else name,
        "num_questions": len(questions),
        "fingerprint": fingerprint,
        "groups": {group: summary(_rows_of(per_question, rows)) for group, rows in groups.items()},
        "intervals": {metric: list(bounds) for metric, bounds in intervals(per_question).items()},
    }
    return Measured(result, _as_rows(questions, per_question))


def intervals(values: Values) -> dict[str, Interval]:
    """95 % interval of each number of `summary`, on its scale; none where nothing is known.

    Shares of questions have Wilson's, all other numbers the bootstrap's; see `statistics.py`. Fractions that are the
    same for all questions have Wilson's, too.
    """
    shares: dict[str, Interval] = {}
    statistics: dict[str, Statistic] = {}
    for name, values_Q in values.items():
        known_Q = values_Q[np.isfinite(values_Q)]
        if metric_of(name).is_binary and len(known_Q) and np.isin(known_Q, (0, 1)).all():
            shares[name] = wilson(known_Q.sum(), len(known_Q))
        elif len(known_Q):
            statistics[name] = weighted_mean(values_Q)
    for name, (tokens, correct, _) in RATIOS.items():
        if tokens in values and correct in values and np.isfinite(ratio(values[tokens], values[correct])):
            statistics[name] = weighted_ratio(values[tokens], values[correct])
    found = shares | bootstrap(statistics, len(next(iter(values.values()))))
    for name in statistics.keys() & values.keys():
        known_Q = values[name][np.isfinite(values[name])]
        if metric_of(name).unit == "%" and np.ptp(known_Q) == 0:
            # Resampling equal values shows no variation. No distribution on [0, 1] varies more than a share.
            found[name] = wilson(known_Q.sum(), len(known_Q))
    order = [name for name in (*values, *RATIOS) if name in found]
    return {name: (metric_of(name).scale * found[name][0], metric_of(name).scale * found[name][1]) for name in order}


def _judged(
    trajectories: Sequence[Trajectory], em_B: np.ndarray, config: EvalConfig, judge: Judge | None
) -> dict[str, np.ndarray]:
    """What a judge says, by metric; float32 [B], NaN = it failed."""
    found: dict[str, np.ndarray] = {}
    if judge is not None and config.judge:
        found["acc"] = accuracy(trajectories, judge, {"em": em_B})[0]
    if judge is not None and config.candidate_em:
        found["candidate_em"] = candidate_em(trajectories, judge, em_B)
    return found


def _rows_of(values: Values, rows: Sequence[int]) -> Values:
    return {name: values_Q[list(rows)] for name, values_Q in values.items()}


def _as_rows(questions: Sequence[Question], values: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    columns = {
        name: [float(value) if np.isfinite(value) else None for value in values_Q] for name, values_Q in values.items()
    }
    return [
        {"id": question.id, "groups": [*groups_of(question), *hops_group(question)]}
        | {name: column[i] for name, column in columns.items()}
        for i, question in enumerate(questions)
    ]

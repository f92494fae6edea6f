"""The metrics by name, each with its definition and source, and one row of a results table from them.

    trajectories ─► measure_each: metric -> value of each trajectory ─► of_questions: mean over a question's samples
                                                                      ─► summary: mean over questions, in % for shares

A value is NaN where a metric says nothing of a trajectory (no supporting passage is known, the judge failed); such
trajectories are left out of that metric's mean. Shape suffixes: B trajectories, Q questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from r3rag_jax.evaluation.answer_texts import contains_characters, hotpot_overlap
from r3rag_jax.rewards.answer import answer_metrics
from r3rag_jax.types import Status, Trajectory

Values = dict[str, np.ndarray]  # metric -> float64 [B] or [Q], NaN = says nothing
SQUAD = "SQuAD (arXiv 1606.05250)"
HOTPOT = "HotpotQA, hotpot_evaluate_v1.py (arXiv 1809.09600)"
FLASHRAG = "FlashRAG, evaluator/metrics.py (arXiv 2405.13576)"
R3RAG = "R3-RAG (arXiv 2505.23794)"
CODEX = "Codex (arXiv 2107.03374), equation 1"
VOTE = "self-consistency (arXiv 2203.11171)"
OWN = "this package"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A named definition.

    Fields:
        title: of its column.
        definition: one sentence; the best gold answer of a question counts.
        source: who defines it so.
        unit: `%` for a share or a fraction, else what is counted.
        decimals: that a table shows.
        is_binary: whether one trajectory, or one vote, has 0 or 1.
        version: grows with each change of what is computed; results of different versions are not compared.
    """

    title: str
    definition: str
    source: str
    unit: str = "%"
    decimals: int = 1
    is_binary: bool = False
    version: int = 1

    @property
    def scale(self) -> float:
        """Factor from a mean value to the number in a table."""
        return 100.0 if self.unit == "%" else 1.0


METRICS: dict[str, Metric] = {
    "em": Metric("EM", "the normalised answer equals a gold answer", SQUAD, is_binary=True),
    "f1": Metric("F1", "F1 of the normalised answer's words; 1 for two texts without words", SQUAD),
    "cover_em": Metric(
        "cover-EM", "the words of a gold answer occur in the answer, in order and without a gap", OWN, is_binary=True
    ),
    "f1_hotpot": Metric("F1 (HotpotQA)", "F1 of words; 0 if either text is yes, no or noanswer, unless equal", HOTPOT),
    "precision": Metric("precision", "share of the answer's words that the gold answer has, with that rule", HOTPOT),
    "recall": Metric("recall", "share of the gold answer's words that the answer has, with that rule", HOTPOT),
    "sub_em": Metric(
        "sub-EM", "a gold answer is a substring of the answer's characters (FlashRAG's `acc`)", FLASHRAG, is_binary=True
    ),
    "acc": Metric("ACC", "exact match, or correct according to the judge", R3RAG, is_binary=True),
    "candidate_em": Metric(
        "candidate EM", "one of the answers that a judge reads off the answer is an exact match", R3RAG, is_binary=True
    ),
    "retrievals": Metric("retrievals", "searches", OWN, "searches", 2),
    "steps": Metric("steps", "reasoning steps, the malformed among them", OWN, "steps", 2),
    "support_found": Metric("support", "share of the supporting passages that were shown", OWN),
    "output_tokens": Metric("output tokens", "tokens that the model wrote", OWN, "tokens", 0),
    "input_tokens": Metric(
        "input tokens", "tokens of the prompts of all its calls, as a server without prefix cache reads them", OWN,
        "tokens", 0,
    ),
    "no_answer": Metric("no answer", "the trajectory ended without an answer", OWN, is_binary=True),
    "context_full": Metric("full", "its context was full before an answer", OWN, is_binary=True),
}  # fmt: skip
ANSWER_RECALL = Metric(
    "answer recall", "one of the first k passages of a search holds a gold answer as a substring of its characters",
    FLASHRAG, is_binary=True,
)  # fmt: skip
# Ratios of sums over questions: name -> (numerator, denominator, definition).
RATIOS = {
    "tokens_per_correct": (
        "output_tokens",
        "em",
        Metric("tokens/correct", "output tokens of all questions per exact match", OWN, "tokens", 0),
    ),
    "input_tokens_per_correct": (
        "input_tokens",
        "em",
        Metric("input tokens/correct", "input tokens of all questions per exact match", OWN, "tokens", 0),
    ),
    "tokens_per_acc": (
        "output_tokens",
        "acc",
        Metric("tokens/ACC", "output tokens of all questions per answer that is correct by ACC", R3RAG, "tokens", 0),
    ),
}
JUDGED = ("acc", "candidate_em")


def metric_of(name: str) -> Metric:
    """The definition behind a name of a result; `answer_recall@k` for any k."""
    if name in METRICS:
        return METRICS[name]
    if name in RATIOS:
        return RATIOS[name][2]
    label, _, k = name.partition("@")
    if label == "answer_recall":
        return dataclasses.replace(ANSWER_RECALL, title=f"answer recall@{k}")
    if label == "pass":
        definition = f"at least one of {k} samples is an exact match, estimated without bias"
        return Metric(f"pass@{k}", definition, CODEX, is_binary=True)
    if label == "majority":
        definition = "the most frequent of the normalised answers is an exact match"
        return Metric(f"majority of {k}", definition, VOTE, is_binary=True)
    raise KeyError(name)


def definitions(recall_k: Sequence[int], judged: Sequence[str] = ()) -> dict[str, int]:
    """The metrics that an evaluation measures, with the versions of their definitions: a fact of its fingerprint."""
    names = [name for name in METRICS if name not in JUDGED or name in judged]
    return {name: metric_of(name).version for name in (*names, *(f"answer_recall@{k}" for k in recall_k))}


def measure_each(
    trajectories: Sequence[Trajectory],
    recall_k: Sequence[int] = (),
    judged: Mapping[str, np.ndarray] | None = None,
    answers: Mapping[str, np.ndarray] | None = None,
) -> Values:
    """The values of each trajectory, metric -> float64 [B], in the order of METRICS.

    Args:
        judged: `acc` and `candidate_em`, float [B], as far as a judge was asked.
        answers: `answer_metrics` of the trajectories; computed where it is None.
    """
    answers = answer_metrics(trajectories) if answers is None else answers
    overlaps = np.asarray([_overlap_of(trajectory) for trajectory in trajectories]).reshape(-1, 3)
    found: dict[str, Any] = {
        **answers,
        "f1_hotpot": overlaps[:, 0],
        "precision": overlaps[:, 1],
        "recall": overlaps[:, 2],
        **(judged or {}),
    }
    for name, value_of in _COUNTS.items():
        found[name] = [value_of(trajectory) for trajectory in trajectories]
    for k in recall_k:
        found[f"answer_recall@{k}"] = [_answer_is_among(trajectory, k) for trajectory in trajectories]
    order = [*METRICS, *(name for name in found if name not in METRICS)]
    return {name: np.asarray(found[name], np.float64) for name in order if name in found}


def _overlap_of(trajectory: Trajectory) -> tuple[float, float, float]:
    answer = trajectory.answer
    return (0.0, 0.0, 0.0) if answer is None else hotpot_overlap(answer, trajectory.question.golden_answers)


def _support_found(trajectory: Trajectory) -> float:
    supporting = set(trajectory.question.supporting_ids)
    return len(supporting & set(trajectory.retrieved_ids)) / len(supporting) if supporting else float("nan")


def _answer_is_among(trajectory: Trajectory, k: int) -> bool:
    golds = trajectory.question.golden_answers
    shown = (passage for step in trajectory.steps for passage in step.passages[:k])
    return any(contains_characters(passage.contents, golds) for passage in shown)


_COUNTS: dict[str, Callable[[Trajectory], float]] = {
    "sub_em": lambda t: t.answer is not None and contains_characters(t.answer, t.question.golden_answers),
    "retrievals": lambda t: t.num_retrievals,
    "steps": lambda t: len(t.steps),
    "support_found": _support_found,
    "output_tokens": lambda t: t.num_policy_tokens,
    "input_tokens": lambda t: float("nan") if t.num_input_tokens is None else t.num_input_tokens,
    "no_answer": lambda t: t.status != Status.ANSWERED,
    "context_full": lambda t: t.status == Status.CONTEXT_FULL,
}


def of_questions(values: Values, num_samples: int) -> Values:
    """Means over the samples of each question, float64 [Q]; the samples of a question follow each other."""
    return {name: _mean(values_B.reshape(-1, num_samples), axis=1) for name, values_B in values.items()}


def summary(values: Values) -> dict[str, Any]:
    """One row of a results table from the values of Q questions; None where nothing is known.

    Shares are percentages from 0 to 100; `num` counts questions.
    """
    row: dict[str, Any] = {"num": len(next(iter(values.values()), ()))}
    for name, values_Q in values.items():
        row[name] = _number(metric_of(name).scale * _mean(values_Q))
        if name == "acc":
            row["judge_failures"] = int(np.isnan(values_Q).sum())
    for name, (tokens, correct, _) in RATIOS.items():
        if tokens in values and correct in values:
            row[name] = _number(ratio(values[tokens], values[correct]))
    return row


def ratio(numerator_Q: np.ndarray, denominator_Q: np.ndarray) -> float:
    """Sum by sum; NaN if the denominator is 0 or a value is unknown."""
    total = denominator_Q.sum()
    return float(numerator_Q.sum() / total) if total else float("nan")


def _mean(values: np.ndarray, axis: int | None = None) -> Any:
    """The mean of the known values; NaN where there are none."""
    known = np.isfinite(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None

"""Two evaluations of the same questions, compared question by question, in one run or in several."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.data.jsonl import read_rows
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.fingerprint import TRAINED_FACTS, describe, differences
from r3rag_jax.evaluation.groups import ALL, group_order
from r3rag_jax.evaluation.metrics import metric_of
from r3rag_jax.evaluation.statistics import Interval, bootstrap, mcnemar, sign_flips, weighted_mean
from r3rag_jax.json_text import parse_json

ROWS_SUFFIX = ".questions.jsonl"


@dataclasses.dataclass(frozen=True)
class Difference:
    """How one metric differs, on the scale of the tables; of the questions of which both values are known.

    Fields:
        num: those questions.
        interval: 95 % of `other - one`, by the bootstrap over questions.
        p_value: of no difference.
        test: `McNemar, exact` for values 0 and 1, else `sign flips`.
        only_one, only_other: for values 0 and 1, questions that one alone has 1 for.
    """

    metric: str
    num: int
    one: float
    other: float
    interval: Interval
    p_value: float
    test: str
    only_one: int | None = None
    only_other: int | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two results, by their titles, and what differs between them."""

    titles: tuple[str, str]
    varied: str  # facts in which they differ, in words
    differences: list[Difference]


@dataclasses.dataclass(frozen=True)
class Pooled:
    """One metric of two systems in several runs, in the mean over the runs: of all questions or a group of them.

    The questions are the unit of interval and test, for those of the runs are the same: a question's value is its mean
    over the runs.
    """

    name: str  # of the run or of the group
    num: int
    one: float
    other: float
    interval: Interval  # 95 % of `other - one`, by the bootstrap over questions
    p_value: float


def compare_runs(
    names: Sequence[str], pairs: Sequence[tuple[Path, Path]], metric: str, varied: Collection[str] = ()
) -> tuple[list[Pooled], list[Pooled]]:
    """Compare a metric of two results in each of several runs, which have answered the same questions.

    Between runs nothing may differ but what was trained, TRAINED_FACTS and the policies.

    Args:
        names: of the runs.
        pairs: `eval/<name>.json` of both, of each run; a result may be that of several.
        varied: facts in which the two of a run are meant to differ.

    Returns:
        Each run by its name, and the mean over the runs: of all questions, then of each group.

    Raises:
        UserError: as `compare`; or the runs are not comparable, or a result lacks the metric.
    """
    found = [compare(one, other, varied) for one, other in pairs]
    for side in zip(*pairs, strict=True):
        for path in side[1:]:
            compare(side[0], path, TRAINED_FACTS)
    for (one, other), comparison in zip(pairs, found, strict=True):
        known = [difference.metric for difference in comparison.differences]
        if metric not in known:
            raise UserError(f"--metric must be one that {one} and {other} have ({', '.join(known)}); got {metric}")
    values_RSQ = np.asarray([[read_values(path)[metric] for path in pair] for pair in pairs])
    rows = [*_read_questions(pairs[0][0]).values()]
    groups = {ALL: np.arange(len(rows))}
    for group in sorted({name for row in rows for name in row.get("groups", ())}, key=group_order):
        groups[group] = np.flatnonzero([group in row.get("groups", ()) for row in rows])
    runs = [_pooled(name, metric, values_RSQ[i : i + 1]) for i, name in enumerate(names)]
    return runs, [_pooled(name, metric, values_RSQ[:, :, chosen]) for name, chosen in groups.items()]


def _pooled(name: str, metric: str, values_RSQ: np.ndarray) -> Pooled:
    values_SQ = values_RSQ.mean(axis=0)
    one_Q, other_Q = values_SQ[:, np.isfinite(values_SQ).all(axis=0)]
    found = _compare(metric, one_Q, other_Q)
    return Pooled(name, found.num, found.one, found.other, found.interval, found.p_value)


def compare(one: Path, other: Path, varied: Collection[str] = ()) -> Comparison:
    """Compare two results, `eval/<name>.json` of any run, by the files of their questions beside them.

    Args:
        varied: facts of the fingerprints in which they are meant to differ, e.g. `retrieval.top_k`.

    Raises:
        UserError: a file is missing or holds no result, or the two are not comparable.
    """
    results = [_read_result(path) for path in (one, other)]
    facts = [result["fingerprint"] for result in results]
    if names := differences(facts[0], facts[1], [name for name in varied if name != "questions"]):
        raise UserError(
            f"{one} and {other} must be comparable; they differ in {describe(facts[0], facts[1], names)}"
            + ("" if "questions" in names else f": --varied {' '.join(names)} compares them all the same")
        )
    tables = [_read_questions(path) for path in (one, other)]
    if [*tables[0]] != [*tables[1]]:
        raise UserError(f"{one} and {other} must have files of the same questions, {ROWS_SUFFIX} beside them")
    meant = differences(facts[0], facts[1])
    return Comparison(
        titles=(_title(one, results[0]), _title(other, results[1])),
        varied=describe(facts[0], facts[1], meant),
        differences=compare_values(*map(_columns, tables)),
    )


def compare_values(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[Difference]:
    """The differences of the metrics that both have; values of the same questions in the same order, NaN = unknown."""
    found = []
    for name in one:
        if name not in other:
            continue
        known_Q = np.isfinite(one[name]) & np.isfinite(other[name])
        if known_Q.any():
            found.append(_compare(name, one[name][known_Q], other[name][known_Q]))
    return found


def _compare(name: str, one_Q: np.ndarray, other_Q: np.ndarray) -> Difference:
    is_binary = bool(np.isin(np.concatenate([one_Q, other_Q]), (0, 1)).all())
    scale, num = metric_of(name).scale, len(one_Q)
    low, high = bootstrap({name: weighted_mean(other_Q - one_Q)}, num)[name]
    return Difference(
        metric=name,
        num=num,
        one=scale * float(one_Q.mean()),
        other=scale * float(other_Q.mean()),
        interval=(scale * low, scale * high),
        p_value=mcnemar(one_Q, other_Q) if is_binary else sign_flips(one_Q, other_Q),
        test="McNemar, exact" if is_binary else "sign flips",
        only_one=int((one_Q > other_Q).sum()) if is_binary else None,
        only_other=int((other_Q > one_Q).sum()) if is_binary else None,
    )


def read_values(path: str | Path) -> dict[str, np.ndarray]:
    """The values of each question of a result, metric -> float64 [Q], NaN = unknown.

    Raises:
        UserError: there is no file of them beside the result.
    """
    return _columns(_read_questions(Path(path)))


def _read_result(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"a result must be a file eval/<name>.json of a run; {path} cannot be read: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("fingerprint"), dict):
        raise UserError(f"a result must be a file eval/<name>.json of a run, with a fingerprint; got {path}")
    return content


def _read_questions(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a result by the ids of their questions, in order."""
    return {
        str(row["id"]): dict(row) for _, row in read_rows(path.with_name(path.name.removesuffix(".json") + ROWS_SUFFIX))
    }


def _columns(rows: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """Metric -> values float64 [Q], NaN = unknown."""
    first = next(iter(rows.values()))
    return {
        name: np.asarray([np.nan if row[name] is None else row[name] for row in rows.values()], np.float64)
        for name in first
        if name not in ("id", "groups")
    }


def _title(path: Path, result: dict[str, Any]) -> str:
    """`<run>: <title>`."""
    return f"{path.resolve().parent.parent.name}: {result.get('title') or result['system']}"

"""Two evaluations of the same questions, compared question by question."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.data.jsonl import read_rows
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.fingerprint import describe, differences
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
        if name != "id"
    }


def _title(path: Path, result: dict[str, Any]) -> str:
    """`<run>: <title>`."""
    return f"{path.resolve().parent.parent.name}: {result.get('title') or result['system']}"

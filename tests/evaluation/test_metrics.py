"""Metrics: typed-out numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from attempts import attempt, attempts, question

from r3rag_jax.evaluation.metrics import measure
from r3rag_jax.types import Sample, Status


def test_measure_is_arithmetic() -> None:
    assert measure(attempts()) == {
        "num": 4,
        "em": 50.0,
        "f1": pytest.approx(100 * (1 + 1 + 2 / 3 + 0) / 4),
        "cover_em": 75.0,
        "retrievals": 0.75,
        "support_found": 75.0,  # 1/2 and 1/1, of the two questions that say
        "tokens_per_correct": pytest.approx((10 + 20 + 10 + 33) / 2),
        "no_answer": 25.0,
        "context_full": 0.0,
    }


def test_full_contexts_are_counted_among_those_without_an_answer() -> None:
    full = dataclasses.replace(attempts()[3], status=Status.CONTEXT_FULL)
    row = measure([*attempts(), full, full, *attempts()[:2]])
    assert (row["context_full"], row["no_answer"]) == (25.0, 37.5)


def test_what_nothing_is_known_of_is_none() -> None:
    row = measure([attempt(question("4", "1809"), "1859")])
    assert row["tokens_per_correct"] is None
    assert row["support_found"] is None
    assert (row["em"], row["retrievals"], row["no_answer"]) == (0.0, 0.0, 0.0)


def test_tokens_are_counted_in_the_samples_where_no_number_is_given() -> None:
    mask = np.array([False, True, True])
    sample = Sample(np.arange(3, dtype=np.int32), mask, np.zeros(3, np.float32), np.where(mask, 0, -1).astype(np.int32))
    trajectory = dataclasses.replace(attempt(question("2", "x"), "x"), num_tokens=None, samples=(sample, sample))
    assert measure([trajectory])["tokens_per_correct"] == 4.0


def test_judged_accuracy_is_of_what_was_judged() -> None:
    row = measure(attempts(), np.asarray([1, 1, np.nan, 0], np.float32))
    assert (row["acc"], row["judge_failures"]) == (pytest.approx(200 / 3), 1)
    assert {name: value for name, value in row.items() if name not in ("acc", "judge_failures")} == measure(attempts())
    assert measure(attempts()[:1], np.asarray([np.nan], np.float32))["acc"] is None

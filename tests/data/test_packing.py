"""Packing: first fit decreasing on typed-out lengths, and how full the rows of a plan are."""

import numpy as np
import pytest

from r3rag_jax.data.packing import first_fit_decreasing, plan_rows
from r3rag_jax.errors import UserError


def test_first_fit_decreasing() -> None:
    #      6 -> [6]   5 -> [5]   4 -> [6 4]   3 -> [5 3]   2 -> [5 3 2]
    assert first_fit_decreasing([2, 3, 4, 5, 6], 10) == [[4, 2], [3, 1, 0]]
    assert first_fit_decreasing([], 10) == []
    with pytest.raises(UserError, match=r"row_length=10 tokens; 2 of 3 do not, the longest has 12"):
        first_fit_decreasing([11, 3, 12], 10)


def test_fill_of_the_plan() -> None:
    plan = plan_rows([6, 4, 5, 5, 8], row_length=10, epochs=3, seed=0)
    assert len(plan.rows) == 9
    assert plan.fill == pytest.approx(28 / 30)
    lengths = np.random.default_rng(0).integers(50, 2000, 5000)
    assert plan_rows(lengths, row_length=4096, epochs=1, seed=0).fill > 0.97

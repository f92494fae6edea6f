"""Metrics of several samples per question: pass@k and the majority vote. Q questions, N samples of each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from r3rag_jax.evaluation.metrics import Values
from r3rag_jax.rewards.normalization import normalize_answer
from r3rag_jax.types import Trajectory


def pass_at_k(correct_QN: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate of the chance that at least one of k samples is correct, float64 [Q].

    1 - C(N - c, k) / C(N, k), where c of the N samples are correct (arXiv 2107.03374, equation 1). To take k samples
    and look gives the same on average, with more noise; 1 - (1 - c/N)^k is too small.

    Raises:
        ValueError: k is not between 1 and N.
    """
    num = correct_QN.shape[1]
    if not 1 <= k <= num:
        raise ValueError(f"k must be from 1 to the {num} samples of a question; got {k}")
    # One entry per possible number of correct samples; integers of any size, so that no binomial overflows.
    table = np.asarray([1 - math.comb(num - c, k) / math.comb(num, k) for c in range(num + 1)])
    return table[np.asarray(correct_QN.sum(axis=1), int)]


def majority(answers: Sequence[str | None]) -> int | None:
    """Index of the sample that speaks for a question: the first with the most frequent normalised answer.

    Of equally frequent answers the one that came first wins; samples without an answer have no vote. None: there is
    no answer.
    """
    votes = Counter(normalize_answer(answer) for answer in answers if answer is not None)
    if not votes:
        return None
    winner = max(votes, key=votes.__getitem__)  # a Counter keeps the order of first occurrence
    return next(i for i, answer in enumerate(answers) if answer is not None and normalize_answer(answer) == winner)


def sampled_values(trajectories: Sequence[Trajectory], em_B: np.ndarray, num_samples: int) -> Values:
    """`pass@k` for k = 1, 2, 4, … and N, and `majority@N`, each float64 [Q]; the samples of a question are adjacent."""
    em_QN = em_B.reshape(-1, num_samples)
    depths = sorted({1 << i for i in range(num_samples.bit_length())} | {num_samples})
    values = {f"pass@{k}": pass_at_k(em_QN, k) for k in depths if k <= num_samples}
    chosen = []
    for row, em_N in enumerate(em_QN):
        samples = trajectories[row * num_samples : (row + 1) * num_samples]
        best = majority([trajectory.answer for trajectory in samples])
        chosen.append(0.0 if best is None else float(em_N[best]))
    return values | {f"majority@{num_samples}": np.asarray(chosen, np.float64)}

"""What process 0 computes for all, and what the others are told when it fails."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from r3rag_jax.errors import UserError
from r3rag_jax.parallel import processes


def test_process_0_computes_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[np.ndarray] = []

    def broadcast(told: np.ndarray) -> np.ndarray:
        sent.append(told)
        return sent[0]

    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def values() -> np.ndarray:
        return np.asarray([0.25, np.nan], np.float32)

    def never() -> np.ndarray:
        raise AssertionError("only process 0 computes")

    def breaks() -> np.ndarray:
        raise UserError("down")

    for process, compute in ((0, values), (1, never)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        np.testing.assert_array_equal(processes.from_process_0(compute, 2), values())
    sent.clear()
    for process, compute, error in ((0, breaks, "down"), (1, never, "process 0 has failed")):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        with pytest.raises(UserError, match=error):
            processes.from_process_0(compute, 2)

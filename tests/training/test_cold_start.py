"""The cold start ends at an update that is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from r3rag_jax.errors import UserError
from r3rag_jax.training import steps

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


def test_the_cold_start_ends_at_a_step_of_nan(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft_loss = steps.sft_loss

    def faulty(*args: Any, **keys: Any) -> Any:
        loss, metrics = sft_loss(*args, **keys)
        return loss * jnp.nan, metrics | {"loss": loss * jnp.nan}

    monkeypatch.setattr(steps, "sft_loss", faulty)
    with pytest.raises(UserError, match=r"cold start, step 0: loss and gradient norm must be finite; got nan and nan"):
        tiny_run.train(tmp_path, base, phases="[index, sft]")
    [path] = (tmp_path / "run" / "checkpoints").glob("bad_step_sft_0.npz")
    assert {"tokens", "positions", "segment_ids", "loss_mask"} == set(np.load(path).files)

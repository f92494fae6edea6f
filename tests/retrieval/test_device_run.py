"""A whole run in miniature whose searches run on its devices: it is the run that FAISS gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import pytest
import tiny_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices"),
]


def test_a_run_that_searches_on_the_devices_has_the_trajectories_of_faiss(
    base: Path, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    flat = finished("tags")
    tiny_run.train(tmp_path, base, "tags", retrieval__kind="device")
    ours = tmp_path / "run"
    for folder in ("trajectories", "data"):
        theirs = {path.name: path.read_text() for path in (flat / folder).iterdir()}
        assert {path.name: path.read_text() for path in (ours / folder).iterdir()} == theirs
        assert any(theirs.values())
    assert tiny_run.metrics(ours) == tiny_run.metrics(flat)
    for phase in ("sft", "rl"):
        assert {name: array.tobytes() for name, array in tiny_run.weights(ours, phase).items()} == {
            name: array.tobytes() for name, array in tiny_run.weights(flat, phase).items()
        }

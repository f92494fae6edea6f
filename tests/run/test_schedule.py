"""A server that stays away: what is done is saved before the run ends."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from r3rag_jax.errors import UNAVAILABLE_STATUS, ServiceError, StopRun, UserError, main_guard
from r3rag_jax.retrieval.base import RetrievalError
from r3rag_jax.run import schedule
from r3rag_jax.run.checkpoints import Checkpoints
from r3rag_jax.run.preemption import StopSignals
from r3rag_jax.run.schedule import SaveSchedule


def run(directory: Path, error: Exception, fails_at: int = 3, stop: StopSignals | None = None) -> None:
    """A phase of 9 steps with a checkpoint every second one, in which step `fails_at` fails."""
    stop = stop or StopSignals()
    state = {"done": 0}
    with Checkpoints(directory) as checkpoints:
        saves = SaveSchedule(checkpoints, stop, every=2, minutes=0, total=9, unit="step")

        def save() -> None:
            checkpoints.save(state["done"], {"x": jnp.full(3, state["done"])}, {})

        for step in itertools.count():
            with saves.saved_from_services(lambda: state["done"], save):
                if step == fails_at:
                    raise error
                state["done"] += 1
            saves.after(state["done"], save)


@pytest.mark.parametrize(("fails_at", "kept"), [(3, 3), (4, 4), (0, None)])
def test_what_is_done_is_saved(
    fails_at: int, kept: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = main_guard(lambda: run(tmp_path, RetrievalError("search failed for 'a'"), fails_at))
    assert main() == UNAVAILABLE_STATUS == 69
    newest = "there is no checkpoint yet" if kept is None else f"the newest checkpoint is of {kept}"
    assert capsys.readouterr().err == (
        f"error: search failed for 'a'; step {fails_at} of 9 is done, {newest}; start the same command again when it "
        "answers\n"
    )
    with Checkpoints(tmp_path) as reader:
        assert reader.latest == kept
        if kept is not None:
            assert reader.restore({"x": jnp.zeros(3, int)})[0]["x"].tolist() == [kept] * 3


def test_a_run_that_is_asked_to_stop_meanwhile_stops(tmp_path: Path) -> None:
    stop = StopSignals()

    stop._state.is_deferred = True
    stop._state.on_note("SIGTERM", now=0)
    with pytest.raises(StopRun, match="SIGTERM: step 1 of 9 is done, the newest checkpoint is of 1; the same command"):
        run(tmp_path, RetrievalError("away"), fails_at=1, stop=stop)


def test_other_errors_save_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a guard"):
        run(tmp_path, UserError("a guard"))
    with Checkpoints(tmp_path) as reader:
        assert reader.latest == 2


@pytest.mark.parametrize(("is_common", "kept"), [(True, 3), (False, 2)])
def test_of_several_processes_all_save_or_none(
    is_common: bool, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is written by all together: what one process alone has met must not make it wait for the others."""
    monkeypatch.setattr(schedule, "jax", SimpleNamespace(process_count=lambda: 2))
    with pytest.raises(ServiceError, match="away"):
        run(tmp_path, ServiceError("away", is_common=is_common))
    with Checkpoints(tmp_path) as reader:
        assert reader.latest == kept

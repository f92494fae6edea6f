"""How a run that is asked to stop ends: what a signal does, and when, and what the loop has saved by then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from r3rag_jax.errors import StopRun, main_guard
from r3rag_jax.run import preemption
from r3rag_jax.run.checkpoints import Checkpoints
from r3rag_jax.run.preemption import Action, StopSignals, StopState, exit_status
from r3rag_jax.run.schedule import SaveSchedule


def test_the_state_machine() -> None:
    loop = StopState(limit_s=60, is_deferred=True)
    assert loop.on_clock(1e9) is Action.NOTHING  # nobody has asked
    assert loop.on_signal("SIGTERM", now=100) is Action.DEFER
    assert loop.on_note("SIGTERM to process 1", now=110) is Action.NOTHING  # the others were told, and tell
    assert (loop.why, loop.deadline) == ("SIGTERM", 160)
    assert (loop.on_clock(159), loop.on_clock(160)) == (Action.NOTHING, Action.EXIT)
    assert loop.on_signal("Ctrl-C", now=120) is Action.EXIT  # a second one
    elsewhere = StopState(limit_s=60)
    assert elsewhere.on_note("SIGTERM to process 1", now=0) is Action.RAISE
    assert elsewhere.on_signal("SIGTERM", now=1) is Action.NOTHING  # the launcher has sent it to all, one by one
    assert elsewhere.on_signal("SIGTERM", now=2) is Action.EXIT


def test_exit_statuses() -> None:
    assert [exit_status(why) for why in ("SIGTERM", "SIGTERM to process 3", "a preemption notice")] == [75] * 3
    assert [exit_status(why) for why in ("Ctrl-C", "Ctrl-C to process 3")] == [130] * 2


def wait_for_signal(number: int) -> None:
    os.kill(os.getpid(), number)
    threading.Event().wait(30)
    raise AssertionError("the wait went on")


@pytest.mark.parametrize(("number", "status", "name"), [(15, 75, "SIGTERM"), (2, 130, "Ctrl-C")], ids=["term", "int"])
def test_work_that_saves_nothing_ends_where_it_is(
    number: int, status: int, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)]

    @main_guard
    def main() -> int:
        with StopSignals():
            wait_for_signal(number)
        return 0

    assert main() == status
    expected = f"stopped: {name}: nothing was being trained; finished files are kept; the same command goes on\n"
    assert capfd.readouterr().err == expected
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)] == before


def test_an_interruption_that_comes_ahead_of_a_wait_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt, calls = StopSignals._interrupt, []

    def lose_the_first(stop: StopSignals) -> None:
        calls.append(stop)
        if len(calls) > 1:
            interrupt(stop)

    monkeypatch.setattr(StopSignals, "_interrupt", lose_the_first)
    with pytest.raises(StopRun), StopSignals():
        wait_for_signal(signal.SIGTERM)
    assert len(calls) == 2


def test_a_loop_finishes_its_step_and_saves(tmp_path: Path) -> None:
    said: list[str] = []
    done: list[int] = []
    stop = StopSignals(60, said.append)
    with pytest.raises(StopRun) as stopped, stop, Checkpoints(tmp_path) as checkpoints, stop.deferred():
        schedule = SaveSchedule(checkpoints, stop, every=2, minutes=0, total=9, unit="step")
        for step in range(1, 10):
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                end = time.monotonic() + 20
                while stop.why is None and time.monotonic() < end:
                    time.sleep(0.01)
            done.append(step)
            schedule.after(step, lambda step=step: checkpoints.save(step, {"x": jnp.full(3, step)}, {}))
    assert done == [1, 2, 3, 4, 5]
    assert (stopped.value.status, str(stopped.value)) == (
        75, "SIGTERM: step 5 of 9 is done, the newest checkpoint is of 5; the same command goes on"
    )  # fmt: skip
    assert said == ["SIGTERM: the step under way is finished and saved, for at most 60 s; a second signal ends at once"]
    with Checkpoints(tmp_path) as reader:
        assert reader.restore({"x": jnp.zeros(3, int)})[0]["x"].tolist() == [5, 5, 5]


def test_a_phase_that_ends_first_is_finished() -> None:
    finished = False
    stop = StopSignals(60)
    with pytest.raises(StopRun, match="the phase is finished"), stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + 20
        while stop.why is None and time.monotonic() < end:
            time.sleep(0.01)
        finished = True
    assert finished


def test_checkpoints_come_by_steps_and_by_minutes(tmp_path: Path) -> None:
    now, saved = [0.0], []
    with Checkpoints(tmp_path) as checkpoints:
        schedule = SaveSchedule(
            checkpoints, StopSignals(), every=4, minutes=2, total=12, unit="step", clock=lambda: now[0]
        )
        for step in range(1, 13):
            now[0] += 50 if step < 7 else 1  # seconds
            schedule.after(step, lambda step=step: saved.append(step))
    assert saved == [3, 4, 8]  # 150 s; by step; 102 s after step 4; after the last step the policy is written instead


@pytest.mark.parametrize(
    ("process", "own", "is_announced", "expected"),
    [
        (0, None, True, "a preemption notice"), (0, "SIGTERM", True, "SIGTERM"), (0, None, False, None),
        (1, "SIGTERM", False, None), (1, None, True, None),
    ],
)  # fmt: skip
def test_process_0_decides(
    process: int, own: str | None, is_announced: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another process only what process 0 says counts; what it was told itself, process 0 learns from its note."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", lambda step: is_announced)
    said_by_0 = [True, None]
    monkeypatch.setattr(preemption, "broadcast_json", lambda value, name: said_by_0 if process else value)
    stop = StopSignals()
    stop._state.is_deferred = True
    if own is not None:
        stop._state.on_signal(own, now=0)
    assert stop.agreed(3, save=process == 0) == (True, expected)
    assert stop.why == (own or expected)


SCRIPT = """
import sys, threading
from r3rag_jax.errors import main_guard
from r3rag_jax.run.preemption import StopSignals
@main_guard
def main():
    stop = StopSignals(float(sys.argv[1]), lambda text: print(text, flush=True))
    with stop, stop.deferred():
        print("ready", flush=True)
        threading.Event().wait(60)  # a step without an end
sys.exit(main())
"""


@pytest.mark.parametrize("why", ["second signal", pytest.param("limit", marks=pytest.mark.slow)])
def test_a_step_without_an_end_ends_at_once(why: str) -> None:
    limit_s = "0.2" if why == "limit" else "60"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, limit_s], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline().startswith("SIGTERM: the step under way is finished")
    if why == "second signal":
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    reason = "a second Ctrl-C" if why == "second signal" else "not done 0.2 s after SIGTERM (stop_s)"
    assert (process.returncode, err) == (
        75, f"stopped at once: {reason}; the same command goes on from the last checkpoint\n"
    )  # fmt: skip

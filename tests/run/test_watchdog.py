"""The watchdog says where the threads stand, once a stall, on stderr and in a file."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from r3rag_jax.run.watchdog import Watchdog, moved


def wait_for_something(release: threading.Event) -> None:
    release.wait()


def reports(directory: Path, count: int) -> list[Path]:
    """The reports, once there are `count`; as many as there are after a while."""
    end = time.monotonic() + 20
    while len(found := sorted(directory.glob("*.txt"))) < count and time.monotonic() < end:
        time.sleep(0.01)
    return found


def test_a_stall_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = threading.Event()
    stuck = threading.Thread(target=wait_for_something, args=(release,), name="rollouts")
    stuck.start()
    try:
        with Watchdog(0.2, tmp_path / "stalls"):
            (report,) = reports(tmp_path / "stalls", 1)
            text = report.read_text()
            time.sleep(0.6)  # three limits later it is still one stall
            assert reports(tmp_path / "stalls", 1) == [report]
            report.unlink()
            moved("rl iteration 4: rollouts")
            (report,) = reports(tmp_path / "stalls", 1)
            assert "since 'rl iteration 4: rollouts'" in report.read_text()
    finally:
        release.set()
        stuck.join()
    assert "in process 0 since 'start' (log.watchdog_s=0.2)" in text
    assert "thread rollouts:" in text and "in wait_for_something\n    release.wait()" in text
    assert "thread MainThread:" in text and "test_a_stall_is_reported_once" in text
    assert capsys.readouterr().err.count("watchdog: nothing has moved") == 2


def test_without_a_limit_nothing_watches(tmp_path: Path) -> None:
    with Watchdog(0, tmp_path):
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    with Watchdog(60, tmp_path):
        assert "watchdog" in [thread.name for thread in threading.enumerate()]
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_a_report_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with Watchdog(0.05, tmp_path / "file"):
        end = time.monotonic() + 20
        while "cannot be written" not in (said := capsys.readouterr().err) and time.monotonic() < end:
            time.sleep(0.05)
    assert "watchdog: " in said and "cannot be written" in said

"""Two runs do not write one directory, and a run that has died holds none."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import tiny_run

import r3rag_jax
from r3rag_jax.config import Config
from r3rag_jax.errors import UserError
from r3rag_jax.run.directory import hold_run
from r3rag_jax.run.lock import locked

HOLD = "import sys; from r3rag_jax.run.lock import locked; from pathlib import Path\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_the_second_run_in_a_directory_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path / "run"))
    with hold_run(config) as run:
        before = tiny_run.files(tmp_path)
        words = rf"{run.path} is in use by process {os.getpid()} on .*: wait for its end, choose another .*/\.lock$"
        with pytest.raises(UserError, match=words), hold_run(config.replace(phases=("index",))):
            raise AssertionError("two runs at once")
        assert tiny_run.files(tmp_path) == before
    with hold_run(config.replace(phases=("index",))):
        assert tiny_run.files(tmp_path) != before


def test_an_error_in_the_run_ends_the_lock(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt), hold_run(config):
        raise KeyboardInterrupt
    with hold_run(config):
        pass


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(r3rag_jax.__file__).parent.parent)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"is in use by process {other.pid} on "), locked(tmp_path / ".lock"):
            raise AssertionError("two runs at once")
        other.send_signal(signal.SIGKILL)
        other.wait()
        with locked(tmp_path / ".lock"):
            pass


def test_a_file_system_without_locks_holds_up_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", fail)
    entered = []
    with locked(tmp_path / ".lock"), locked(tmp_path / ".lock"):
        entered.append("both")
    assert entered == ["both"]


def test_a_directory_of_something_else_gets_no_lock(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"), hold_run(Config(run_dir=str(tmp_path))):
        raise AssertionError("a run among other files")
    assert tiny_run.files(tmp_path) == {"thesis.tex": b"mine"}


def test_a_run_that_was_killed_before_it_wrote_anything_can_begin(tmp_path: Path) -> None:
    with locked(tmp_path / "run" / ".lock"):
        pass
    with hold_run(Config(run_dir=str(tmp_path / "run"))) as run:
        assert run.config_file.is_file()

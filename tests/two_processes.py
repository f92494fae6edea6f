"""Two real processes that train together, each with forced CPU devices of its own, and how they end."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import r3rag_jax

PACKAGE_PARENT = Path(r3rag_jax.__file__).parent.parent


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def spawn(command: Sequence[str], num_devices: int, directory: Path, output: Path | None = None,
          **environment: str) -> subprocess.Popen[str]:  # fmt: skip
    """A Python process with `num_devices` devices of its own; what it says goes to a pipe, or to file `output`."""
    own = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}", "PYTHONPATH": str(PACKAGE_PARENT)}
    out = subprocess.PIPE if output is None else output.open("w")
    try:
        return subprocess.Popen(
            [sys.executable, *command], env=os.environ | own | environment, stdout=out, stderr=subprocess.STDOUT,
            text=True, cwd=directory,
        )  # fmt: skip
    finally:
        if output is not None:
            out.close()  # type: ignore[union-attr]  # the process has its own handle


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """What processes with a pipe said; all must have ended well."""
    try:
        said = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


@dataclasses.dataclass
class Pair:
    """Two processes of one run. As a context manager it leaves none behind."""

    processes: list[subprocess.Popen[str]]
    outputs: list[Path]

    @classmethod
    def start(cls, program: Sequence[str], directory: Path, *, devices: int = 4, **environment: str) -> Pair:
        """Start `program`, which takes `key=value` words; what process k says is in `directory/process-<k>.txt`."""
        pair = [
            "mesh.distributed=true", "mesh.num_processes=2", f"mesh.coordinator=127.0.0.1:{free_port()}"
        ]  # fmt: skip
        outputs = [directory / f"process-{rank}.txt" for rank in range(2)]
        processes = [
            spawn([*program, *pair, f"mesh.process_id={rank}"], devices, directory, outputs[rank], **environment)
            for rank in range(2)
        ]
        return cls(processes, outputs)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self) -> list[str]:
        """What each process has said so far."""
        return [output.read_text() for output in self.outputs]

    def wait_until(self, is_there: Callable[[], bool], limit_s: float = 600) -> None:
        """Wait for something that the processes do."""
        end = time.monotonic() + limit_s
        while not is_there():
            assert all(process.poll() is None for process in self.processes) or is_there(), "\n".join(self.said())
            assert time.monotonic() < end, "\n".join(self.said())
            time.sleep(0.1)

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one of them."""
        self.processes[rank].send_signal(number)

    def statuses(self, limit_s: float = 600) -> list[int]:
        """Wait for both to end and return their exit statuses; those that live on after `limit_s` fail the test."""
        end = time.monotonic() + limit_s
        try:
            return [process.wait(max(0.0, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still alive after {limit_s} s:\n" + "\n".join(self.said())) from None


def training(recipe: Path, *overrides: str) -> list[str]:
    """The command that trains, for `Pair.start`."""
    return ["-m", "r3rag_jax.train", "--config", str(recipe), *overrides]

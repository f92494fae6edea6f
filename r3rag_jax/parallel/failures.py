"""Processes that end together: when one fails, the others say which and why, and end too.

A process that waits for another one, in a device program or for a broadcast, would wait for ever if that one has
failed. So each process has a thread that looks at the coordination service of `jax.distributed` every `POLL_S` seconds:

    process 2 raises ─► error ─► coordination service ─► threads of the others: print "process 2: …", exit status 4
                                  (in process 0)

A process that is killed says nothing. The coordination service ends the others, with status 134 and the number of the
process that is gone, `HEARTBEAT_S` seconds after its last heartbeat; at once where it was process 0. `SILENT_S` seconds
after its last sign of life the threads of the others say so.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from r3rag_jax.errors import report_error

POLL_S = 2.0  # pause between two looks at the coordination service, in seconds
SILENT_S = 15.0  # without a sign of life for so long, a process is reported; it may just be busy
HEARTBEAT_S = 40  # without a heartbeat for so long, a process is gone, and XLA ends all others
LEAVE_S = 15.0  # process 0, which runs the coordination service, waits so long for the others to learn of a failure
PEER_FAILED_STATUS = 4  # exit status of a process that ends because another one failed

STATUS = re.compile("(ABORTED|CANCELLED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): ")  # XLA's, in a ValueError
WATCHED = "r3rag_jax/watched"  # keys below it are read at every look
FAILURE, ALIVE = f"{WATCHED}/failure", f"{WATCHED}/alive"
TOLD = "r3rag_jax/told"  # how many processes know of the failure


class FailureWatch:
    """Tells the other processes of a failure of this one, and ends this one when another has failed."""

    def __init__(self, client: Any, process: int, num_processes: int):
        """`client`: of the coordination service; `process`: the number of this one."""
        self._client, self._process, self._num_processes = client, process, num_processes
        self._signs: dict[int, tuple[str, float]] = {}  # process -> last sign of life, and when it was first seen
        self._silent: list[int] = []  # processes without a sign of life
        self._failure: dict[str, Any] | None = None  # of the first process that failed: {process, error}
        self._has_told = False
        self._stop = threading.Event()
        self._is_leaving = threading.Lock()  # held for good by the first thread that ends the process
        self._thread = threading.Thread(target=self._watch, name="failure watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more: all processes are done."""
        self._stop.set()
        self._thread.join()

    def leave(self, error: BaseException) -> NoReturn:
        """Tell the other processes of an error, print it, and end this process."""
        self.tell(error)
        is_first = self._failure is None or self._failure["process"] == self._process
        if not is_first and _may_be_of_a_peer(error):
            self._exit(PEER_FAILED_STATUS)  # the cause was printed; a closed connection says nothing more
        status = report_error(error)
        self._exit(status if is_first else PEER_FAILED_STATUS)

    def tell(self, error: BaseException) -> None:
        """Tell the other processes of an error, of which this one is about to end; only the first time counts."""
        if self._has_told:
            return
        self._has_told = True
        self._is_leaving.acquire()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:4000]
        if _may_be_of_a_peer(error):
            self._wait_for_cause()
            if self._silent:
                text = f"{_processes(self._silent)} gave no sign of life for {SILENT_S:g} s; {text}"
        if self._failure is None:
            failure = json.dumps({"process": self._process, "error": text})
            self._try(lambda: self._client.key_value_set(FAILURE, failure))
        else:
            self._say_failure(self._failure)

    def _wait_for_cause(self) -> None:
        """Wait until another process has told of a failure or is known to be silent, or that would have been seen."""
        end = time.monotonic() + SILENT_S + 3 * POLL_S
        while self._failure is None and not self._silent and time.monotonic() < end:
            time.sleep(POLL_S / 4)

    def _watch(self) -> None:
        beat = 0
        while not self._stop.wait(POLL_S):
            beat += 1
            try:
                self._client.key_value_set(f"{ALIVE}/{self._process}", str(beat), True)
                found = dict(self._client.key_value_dir_get(WATCHED))
            except jax.errors.JaxRuntimeError:
                continue  # without its coordination service XLA ends the process
            if FAILURE in found:
                self._failure = json.loads(found[FAILURE])
                if self._is_leaving.acquire(blocking=False):
                    self._exit(self._say_failure(self._failure))
            self._look_for_silent(found)

    def _say_failure(self, failure: dict[str, Any]) -> int:
        """Print the failure of another process; returns the exit status."""
        print(f"error: process {failure['process']}: {failure['error']}", file=sys.stderr, flush=True)
        return PEER_FAILED_STATUS

    def _look_for_silent(self, found: dict[str, str]) -> None:
        """Note which processes give no sign of life, and say so when there are others than before."""
        now = time.monotonic()
        for process in range(self._num_processes):
            sign = found.get(f"{ALIVE}/{process}", "")
            if process not in self._signs or self._signs[process][0] != sign:
                self._signs[process] = sign, now
        silent = [process for process, (_, since) in sorted(self._signs.items()) if now - since > SILENT_S]
        if set(silent) - set(self._silent):
            print(
                f"warning: {_processes(silent)} gave no sign of life for {SILENT_S:g} s; once {HEARTBEAT_S} s have "
                "passed without a heartbeat, all end; the same command resumes",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        self._silent = silent

    def _exit(self, status: int) -> NoReturn:
        """End the process now, wherever its other threads stand; process 0 waits until all know of the failure."""
        end = time.monotonic() + LEAVE_S
        num_told = self._try(lambda: self._client.key_value_increment(TOLD, 1))
        while self._process == 0 and num_told is not None and num_told < self._num_processes and time.monotonic() < end:
            time.sleep(POLL_S / 4)
            num_told = self._try(lambda: self._client.key_value_increment(TOLD, 0))
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(status)

    def _try(self, request: Callable[[], Any]) -> Any:
        """The reply of the coordination service; None where it fails or is gone, as this process ends anyway."""
        try:
            return request()
        except jax.errors.JaxRuntimeError:
            return None


def _may_be_of_a_peer(error: BaseException) -> bool:
    """Whether an error is of a device program or of the coordination service, which fail when a process is gone."""
    is_status = isinstance(error, ValueError) and STATUS.match(str(error)) is not None
    return is_status or isinstance(error, jax.errors.JaxRuntimeError)


def _processes(numbers: list[int]) -> str:
    return f"process {numbers[0]}" if len(numbers) == 1 else f"processes {', '.join(map(str, numbers))}"

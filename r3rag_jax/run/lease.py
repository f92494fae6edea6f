"""The lock of a run directory in a bucket: an object that names its owner, who changes it every `BEAT_S` seconds.

    {"owner": "process 71 on host-3", "id": "5b0c…", "beat": 12}

Buckets have no locks that end with a process, but they create an object only if there is none, for one of any number
of processes that try at once. A lease that has not changed for `LEASE_S` seconds is of a dead process and is taken
over; so is at once one of a dead process on this host. No clock of another machine is read. An owner that finds
another one's lease (its machine was frozen for longer than `LEASE_S`) writes nothing any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from r3rag_jax.errors import UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.run.lock import is_alive

BEAT_S = 20.0
LEASE_S = 90.0
SETTLE_S = 2.0  # after a takeover the lease is read again: of two processes that take over, the later one has it


class Lease:
    """The lock of one run directory, held by this process."""

    def __init__(self, filesystem: Any, path: str, console: Console):
        """
        Args:
            filesystem: of fsspec, with exclusive creation.
            path: URL of the lease.
            console: is told what is waited for.
        """
        self._filesystem, self._path, self._console = filesystem, path, console
        self._lease = {"owner": f"process {os.getpid()} on {platform.node()}", "id": uuid.uuid4().hex, "beat": 0}
        self._lost_to: str | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lease while the block runs.

        Raises:
            UserError: another process holds it.
        """
        self._acquire()
        has_ended = threading.Event()
        thread = threading.Thread(target=self._beat, args=(has_ended,), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            has_ended.set()
            thread.join()
            if self._is_mine(self._read()):
                self._filesystem.rm_file(self._path)

    def check(self) -> None:
        """To be called before something is written.

        Raises:
            UserError: another process has taken the lease over.
        """
        if self._lost_to is not None:
            raise UserError(
                f"{self._path} was taken over by {self._lost_to}: this process gave no sign of life for {LEASE_S:g} s, "
                "and that one goes on with the run"
            )

    def _acquire(self) -> None:
        seen, since, has_said = self._read(), time.monotonic(), False
        while not self._create():
            found = self._read()
            if found is None:
                continue
            if found != seen and seen is not None:
                raise self._in_use(found)
            seen = found
            if _is_dead(found) or time.monotonic() - since >= LEASE_S:
                self._take_over(found)
                return
            if not has_said:
                self._console.print(
                    f"{self._path} is of {found.get('owner')}, which may be dead: waiting for its sign of life, for at "
                    f"most {LEASE_S:g} s", highlight=False, markup=False, soft_wrap=True,
                )  # fmt: skip
                has_said = True
            time.sleep(BEAT_S / 4)

    def _take_over(self, found: dict[str, Any]) -> None:
        if self._read() == found:
            self._filesystem.rm_file(self._path)
        if not self._create():
            raise self._in_use(self._read() or {})
        time.sleep(SETTLE_S)
        if not self._is_mine(now := self._read()):
            raise self._in_use(now or {})

    def _beat(self, has_ended: threading.Event) -> None:
        while not has_ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the bucket is out of reach for a while: the next beat may succeed
                if not self._is_mine(now := self._read()):
                    self._lost_to = (now or {}).get("owner", "another process")
                    return
                self._lease["beat"] += 1  # type: ignore[operator]
                self._filesystem.pipe_file(self._path, json.dumps(self._lease).encode())

    def _create(self) -> bool:
        """Write the lease if there is none; returns whether it was written."""
        try:
            self._filesystem.pipe_file(self._path, json.dumps(self._lease).encode(), mode="create")
        except FileExistsError:
            return False
        return True

    def _read(self) -> dict[str, Any] | None:
        """The lease in the bucket; None where there is none, {} where it is none of this format."""
        try:
            value = parse_json(self._filesystem.cat_file(self._path))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def _is_mine(self, lease: dict[str, Any] | None) -> bool:
        return lease is not None and lease.get("id") == self._lease["id"]

    def _in_use(self, lease: dict[str, Any]) -> UserError:
        owner = lease.get("owner", "another process")
        return UserError(
            f"a run directory is written by one run at a time; {self._path} is of {owner}: wait for its end, or choose "
            "another name=…"
        )


def _is_dead(lease: dict[str, Any]) -> bool:
    """Whether the owner was a process of this host that has ended."""
    words = str(lease.get("owner")).split(" ", 3)
    if len(words) != 4 or words[3] != platform.node() or not words[1].isdigit():
        return False
    return not is_alive(int(words[1]))

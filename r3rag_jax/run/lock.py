"""A lock per run directory: two runs do not write the same files.

It is a lock of the operating system on a file, which ends with the process, however that dies. Only training takes it:
`evaluate`, `ask` and `report` write files of their own names, whole, and may be used while the run goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from r3rag_jax.errors import UserError
from r3rag_jax.parallel.processes import on_process_0

HELD = (errno.EAGAIN, errno.EACCES)  # another process has the lock; other errors: the file system has no locks


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the run directory that `path` is in. Process 0 holds it, but all processes must call.

    On a file system without locks nothing is held.

    Raises:
        UserError: another process holds it.
    """
    with contextlib.ExitStack() as stack:

        def acquire() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _lock(stack.enter_context(path.open("a+b")), path)

        on_process_0(acquire, "lock of the run directory")
        yield


@contextlib.contextmanager
def alone_on_host(path: Path) -> Iterator[None]:
    """Run the block in one process of this host, and one of its threads, at a time; the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_alive(pid: int) -> bool:
    """Whether a process of this host is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock an open file until it is closed, and write who has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in HELD:
            return
        file.seek(0)
        holder = file.read(200).decode("utf-8", "replace").strip() or "another process"
        raise UserError(
            f"a run directory is written by one run at a time; {path.parent} is in use by {holder}: wait for its end, "
            f"choose another name=…, or, where a server has kept the lock of a machine that died, remove {path}"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
    file.flush()

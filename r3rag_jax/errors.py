"""The error that a user can fix, the request to stop, and how an entry point reports them."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

USER_ERROR_STATUS = 2
UNAVAILABLE_STATUS = 69  # EX_UNAVAILABLE of sysexits.h: a server that the run needs stays away
TERMINATED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells count it
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# What a directory may refuse: a file system that is read-only or broken, a path that leads nowhere.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
           errno.ENAMETOOLONG)  # fmt: skip


MAX_MESSAGE = 2000  # characters of an error's message


def shortened(message: str, limit: int = MAX_MESSAGE) -> str:
    """A message of at most about `limit` characters: a value that it quotes may have millions.

    The middle is left out. The beginning says where the input is, the end often what to do.
    """
    if len(message) <= limit:
        return message
    kept = limit // 2
    return f"{message[:kept]} … ({len(message) - 2 * kept} characters left out) … {message[-kept:]}"


class UserError(ValueError):
    """Bad input; its message is one line: where the input is (key, or file and line), the rule, and the value."""

    status = USER_ERROR_STATUS  # of the process that ends with it

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(shortened(message).split()))


class ServiceError(UserError):
    """A server, or a user's own retriever, that a run needs does not answer, or answers wrongly.

    Nothing may be wrong with the run: the same command may go on later. RL saves before it ends.

    Fields:
        is_common: whether all processes of the run raise it at the same place; see `on_process_0`.
    """

    status = UNAVAILABLE_STATUS

    def __init__(self, message: str, *, is_common: bool = False) -> None:
        super().__init__(message)
        self.is_common = is_common


class StopRun(KeyboardInterrupt):
    """A signal has asked the process to end, and it does. As Ctrl-C, it passes `except Exception`.

    Fields:
        status: the exit status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def report_error(error: BaseException) -> int:
    """Print an error to stderr, and return the exit status that goes with it.

    A UserError, or a directory that is full or refuses, is one `error: …` line and status 2 (69: a ServiceError); a
    stop, also Ctrl-C, is one `stopped: …` line and a status of its own; any other exception is a bug: its traceback
    and 1.
    """
    if isinstance(error, KeyboardInterrupt):
        _say(f"stopped: {error if isinstance(error, StopRun) else 'Ctrl-C'}")
        return error.status if isinstance(error, StopRun) else INTERRUPTED_STATUS
    message = user_message(error)
    if message is None:
        traceback.print_exception(error)
        return 1
    _say(f"error: {message}")
    return error.status if isinstance(error, UserError) else USER_ERROR_STATUS


def _say(line: str) -> None:
    """Print a line to stderr. Where stdout or stderr is full or closed, nobody can be told; the exit status stays."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{line}\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # else the interpreter would try once more at its end, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def user_message(error: BaseException) -> str | None:
    """What a user is told in one line about an error that a user can fix; None for others."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        where = error.filename or "a file"
        return f"{where} cannot be written: {error.strerror}; make room and start the same command again"
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename is not None:
        return f"{error.filename} must be a place that can be read and written; got: {error.strerror}"
    return None


def main_guard(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorate an entry point: what `user_message` knows becomes one `error: …` line on stderr and an exit status.

    A stop by a signal becomes one `stopped: …` line and its own status, also Ctrl-C. The decorated function returns the
    exit status (None counts as 0); any other exception is a bug and propagates with its traceback.
    Use: `if __name__ == "__main__": sys.exit(main())`.
    """

    @functools.wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except KeyboardInterrupt as stop:
            return report_error(stop)
        except Exception as error:
            if user_message(error) is None:
                raise
            return report_error(error)

    return guarded

"""The error that a user can fix, the request to stop, and how an entry point reports them."""

from __future__ import annotations

import errno
import functools
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

USER_ERROR_STATUS = 2
TERMINATED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells count it
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


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

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(shortened(message).split()))


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

    A UserError, or a full disk, is one `error: …` line and status 2; a stop, also Ctrl-C, is one `stopped: …` line and
    a status of its own; any other exception is a bug: its traceback and 1.
    """
    if isinstance(error, KeyboardInterrupt):
        print(f"stopped: {error if isinstance(error, StopRun) else 'Ctrl-C'}", file=sys.stderr)
        return error.status if isinstance(error, StopRun) else INTERRUPTED_STATUS
    message = user_message(error)
    if message is None:
        traceback.print_exception(error)
        return 1
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR_STATUS


def user_message(error: BaseException) -> str | None:
    """What a user is told in one line about an error that a user can fix; None for others."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        where = error.filename or "a file"
        return f"{where} cannot be written: {error.strerror}; make room and start the same command again"
    return None


def main_guard(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorate an entry point: a UserError, or a full disk, becomes one `error: …` line on stderr and exit status 2.

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

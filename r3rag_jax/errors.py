"""The error that a user can fix, and how an entry point reports it."""

from __future__ import annotations

import errno
import functools
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

USER_ERROR_STATUS = 2
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """Bad input; its message is one line: where the input is (key, or file and line), the rule, and the value."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def report_error(error: BaseException) -> int:
    """Print an error to stderr, and return the exit status that goes with it.

    A UserError, or a full disk, is one `error: …` line and status 2; any other exception is a bug: its traceback and 1.
    """
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

    The decorated function returns the exit status (None counts as 0); any other exception is a bug
    and propagates with its traceback. Use: `if __name__ == "__main__": sys.exit(main())`.
    """

    @functools.wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except Exception as error:
            if user_message(error) is None:
                raise
            return report_error(error)

    return guarded

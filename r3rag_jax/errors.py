"""The error that a user can fix, and how an entry point reports it."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

USER_ERROR_STATUS = 2
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """Bad input; its message is one line: where the input is (key, or file and line), the rule, and the value."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def main_guard(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorate an entry point: a UserError, or a full disk, becomes one `error: …` line on stderr and exit status 2.

    The decorated function returns the exit status (None counts as 0); any other exception is a bug
    and propagates with its traceback. Use: `if __name__ == "__main__": sys.exit(main())`.
    """

    @functools.wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            message = str(error)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            where = error.filename or "a file"
            message = f"{where} cannot be written: {error.strerror}; make room and start the same command again"
        print(f"error: {message}", file=sys.stderr)
        return USER_ERROR_STATUS

    return guarded

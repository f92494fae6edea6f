"""Errors of users end with one line and status 2; other exceptions are bugs."""

import errno

import pytest

from r3rag_jax.errors import UserError, main_guard


def test_main_guard_turns_user_errors_alone_into_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class DataError(UserError):
        """Bad input of another layer."""

    @main_guard
    def main(error: Exception | None, status: int | None = None) -> int | None:
        if error is not None:
            raise error
        return status

    assert main(DataError("q.jsonl:3: expected JSON;\n got '{'")) == 2
    assert capsys.readouterr() == ("", "error: q.jsonl:3: expected JSON; got '{'\n")
    assert (main(None), main(None, 3)) == (0, 3)
    assert main(OSError(errno.ENOSPC, "No space left on device")) == 2
    assert capsys.readouterr().err.startswith("error: a file cannot be written: No space left on device; make room and")
    with pytest.raises(FileNotFoundError):
        main(FileNotFoundError(errno.ENOENT, "No such file"))
    with pytest.raises(ValueError, match="a bug"):
        main(ValueError("a bug"))
    assert main.__name__ == "main"

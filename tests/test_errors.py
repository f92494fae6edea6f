"""Errors of users end with one line and status 2; other exceptions are bugs."""

import errno
import os
import re
import subprocess
import sys

import pytest

from r3rag_jax.errors import MAX_MESSAGE, ServiceError, UserError, main_guard, shortened
from r3rag_jax.retrieval.base import RetrievalError, failed_search


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


def test_a_message_that_quotes_millions_of_characters_keeps_its_beginning_and_its_end() -> None:
    assert shortened("x" * MAX_MESSAGE) == "x" * MAX_MESSAGE
    for error in (UserError, RetrievalError):
        message = str(error(f"q.jsonl:3: ids must be unique; {'9' * 5_000_000} is also on line 1"))
        assert len(message) < MAX_MESSAGE + 100
        assert message.startswith("q.jsonl:3: ids must be unique; 999") and message.endswith("999 is also on line 1")
        assert re.search(r"… \(49980\d\d characters left out\) …", message)
    assert len(str(failed_search(["x" * 10**6] * 9, "y" * 10**6))) < MAX_MESSAGE + 100


def test_a_server_that_stays_away_has_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    @main_guard
    def main() -> None:
        raise ServiceError("judge.endpoint.url: no\nreply")

    assert main() == 69
    assert capsys.readouterr().err == "error: judge.endpoint.url: no reply\n"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_place_that_refuses_is_named(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    @main_guard
    def main(*place: str) -> None:
        raise OSError(number, os.strerror(number), *place)

    assert main("runs/x/metrics.jsonl") == 2
    assert capsys.readouterr().err == (
        f"error: runs/x/metrics.jsonl must be a place that can be read and written; got: {os.strerror(number)}\n"
    )
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        main()  # of a socket, or of a library that does not say


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device without room")
def test_what_cannot_be_printed_changes_no_status() -> None:
    program = (
        "import sys\n"
        "from r3rag_jax.errors import UserError, main_guard\n"
        "@main_guard\n"
        "def main():\n"
        "    print('a line that waits in the buffer')\n"
        "    raise UserError('no')\n"
        "sys.exit(main())\n"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        for streams in ({"stdout": full, "stderr": full}, {"stdout": full, "stderr": subprocess.PIPE}):
            ended = subprocess.run([sys.executable, "-c", program], **streams, env=buffered)  # type: ignore[call-overload]
            assert (ended.returncode, ended.stderr) in ((2, None), (2, b"error: no\n"))

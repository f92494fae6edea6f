"""JSONL files: files that cannot be read are named with their lines, and files are written whole or not at all."""

from pathlib import Path

import pytest
from rows import QUESTION, write

from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.questions import read_passages, read_questions
from r3rag_jax.errors import UserError


def test_files_that_hold_nothing_readable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.jsonl: expected a readable .*No such file"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="the file holds none"):
        read_passages(write(tmp_path, "", "  "))
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(b'{"id": "0", "contents": "a"}\n{"id": "1", "contents": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin1\.jsonl:2: expected UTF-8; got byte 0xe9 at col"):
        read_passages(path)


def test_an_escaped_emoji_is_text(tmp_path: Path) -> None:
    path = write(tmp_path, '{"id": "0", "contents": "\\ud83d\\ude00"}')
    assert read_passages(path)[0].contents == "😀"


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = write(tmp_path, QUESTION)
    before = path.read_bytes()

    def rows():
        yield QUESTION
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_jsonl(path, rows())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from tiny_run import files as tiny_files

import r3rag_jax
from r3rag_jax.run.files import (
    append_rows,
    is_partial,
    keep_rows,
    new_directory,
    open_atomic,
    open_atomic_binary,
    write_json,
    write_text,
)


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "Gödel\n")
    assert path.read_bytes() == "Gödel\n".encode()
    write_text(path, "")
    assert path.read_bytes() == b""
    assert list(path.parent.iterdir()) == [path]  # nothing is left beside it


def test_what_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), open_atomic(path) as file:
        file.write("new, and longer")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_the_old_content_and_a_file_that_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    code = "import os, sys; from r3rag_jax.run.files import open_atomic\n"
    code += "with open_atomic(sys.argv[1]) as file:\n file.write('new')\n file.flush()\n os._exit(9)"
    environment = os.environ | {"PYTHONPATH": str(Path(r3rag_jax.__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", code, str(path)], env=environment).returncode == 9
    assert path.read_text() == "old"
    [left] = [other for other in tmp_path.iterdir() if other != path]
    assert left.read_text() == "new" and is_partial(left) and not is_partial(path)


@pytest.mark.parametrize("moment", ["write", "fsync"])
def test_a_full_disk_leaves_the_old_content(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "config.yaml", "old")

    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if moment == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            write_text(tmp_path / "config.yaml", "new")
        with pytest.raises(OSError, match="No space left"), open_atomic_binary(tmp_path / "weights") as file:
            file.write(b"w")
    assert (tmp_path / "config.yaml").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """Neither `write` nor numpy does."""
    path, wanted = tmp_path / "vectors.npy", f"[Errno 28] No space left on device: '{tmp_path / 'vectors.npy'}'"
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError("80896 requested and 18400 written")):
        with pytest.raises(OSError) as caught, open_atomic_binary(path):
            raise error
        assert (caught.value.errno, str(caught.value)) == (errno.ENOSPC, wanted)
    with pytest.raises(OSError, match="of a library"), open_atomic_binary(path):
        raise OSError("of a library")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_appears_with_all_of_its_files(tmp_path: Path) -> None:
    left = tmp_path / ".policy.partial"  # of a process that was killed
    left.mkdir()
    (left / "stale").write_text("of another model")
    assert is_partial(left)
    with new_directory(tmp_path / "policy") as partial:
        (partial / "weights").write_bytes(b"w")
        assert [path.name for path in tmp_path.iterdir()] == [".policy.partial"]
    assert tiny_files(tmp_path) == {"policy/weights": b"w"}
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "other") as partial:
        (partial / "weights").write_bytes(b"half")
        raise KeyboardInterrupt
    with new_directory(tmp_path / "other", is_writer=False) as partial:
        assert partial == tmp_path / ".other.partial"
    assert tiny_files(tmp_path) == {"policy/weights": b"w"}


def test_rows_are_appended_and_those_to_keep_are_kept_letter_by_letter(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"n": 1, "text": "Gödel\u2028"}])
    append_rows(path, [{"n": 2}, {"n": 3}])
    with path.open("ab") as file:
        file.write(b'{"n":   4 }\n\xff\n[]\n\n' + b"[" * 100_000 + b'\n{"n": 5')
    keep_rows(path, lambda row: row["n"] != 2)
    assert path.read_text("utf-8") == '{"n": 1, "text": "Gödel\u2028"}\n{"n": 3}\n{"n":   4 }\n'


def test_json_is_for_people(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", {"em": 61.0, "groups": {"all": [1]}})
    text = (tmp_path / "one.json").read_text()
    assert text == '{\n  "em": 61.0,\n  "groups": {\n    "all": [\n      1\n    ]\n  }\n}\n'

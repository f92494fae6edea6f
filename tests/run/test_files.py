"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import r3rag_jax
from r3rag_jax.run.files import is_partial, open_atomic, write_json, write_text


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


def test_json_is_for_people(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", {"em": 61.0, "groups": {"all": [1]}})
    text = (tmp_path / "one.json").read_text()
    assert text == '{\n  "em": 61.0,\n  "groups": {\n    "all": [\n      1\n    ]\n  }\n}\n'

"""Digests of files: of their contents, and read only when a file looks changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from r3rag_jax.errors import UserError
from r3rag_jax.run.digests import SETTINGS_FILES, FileDigests, check_sums, stamp, write_sums


@pytest.fixture
def digests(tmp_path: Path) -> FileDigests:
    return FileDigests(tmp_path / "run" / "digests.json")


def test_a_digest_is_of_the_content_and_is_remembered_by_size_and_time(digests: FileDigests, tmp_path: Path) -> None:
    file, reads = tmp_path / "a", []

    def compute(path: Path) -> str:
        reads.append(path)
        return path.read_text()

    file.write_text("one")
    assert digests.get(file) == hashlib.sha256(b"one").hexdigest()
    assert not digests.knows(file, "text")
    assert digests.get(file, "text", compute) == digests.get(file, "text", compute) == "one" and len(reads) == 1
    assert digests.knows(file, "text")
    os.utime(file, ns=(0, 10**18))
    assert digests.get(file, "text", compute) == "one" and len(reads) == 2  # it looks changed
    file.write_text("other")
    os.utime(file, ns=(0, 10**18))
    assert digests.get(file, "text", compute) == "other"  # another size, the same time
    assert FileDigests(tmp_path / "run" / "digests.json").get(file, "text", compute) == "other" and len(reads) == 3
    (tmp_path / "run" / "digests.json").write_text('{"text')  # a damaged memory is none
    assert digests.get(file, "text", compute) == "other" and len(reads) == 4


def test_what_was_seen_before_reading_counts(digests: FileDigests, tmp_path: Path) -> None:
    """A file that changes while it is read has another stamp than the one recorded."""
    file = tmp_path / "a"
    file.write_text("one")
    seen = stamp(file)
    file.write_text("longer")
    digests.record(file, "text", "one", seen)
    assert digests.get(file, "text", Path.read_text) == "longer"


def test_a_models_digest_is_of_names_and_contents_of_its_files(digests: FileDigests, tmp_path: Path) -> None:
    def model(name: str, **files: str) -> Path:
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file.replace("__", ".")).write_text(text)
        return tmp_path / name

    files = {"config__json": "{}", "model__safetensors": "w", "tokenizer__json": "t", "chat_template__jinja": "c"}
    one = digests.of_model(model("one", **files))
    assert digests.of_model(model("copy", **files, README__md="words", provenance__json="{}")) == one
    assert digests.of_model(model("weights", **files | {"model__safetensors": "v"})) != one
    assert digests.of_model(model("template", **files | {"chat_template__jinja": "d"})) != one
    swapped = files | {"config__json": "t", "tokenizer__json": "{}"}
    assert digests.of_model(model("swapped", **swapped)) != one
    settings = digests.of_model(tmp_path / "one", SETTINGS_FILES)
    assert settings == digests.of_model(tmp_path / "weights", SETTINGS_FILES) != one
    assert settings != digests.of_model(tmp_path / "template", SETTINGS_FILES)


def test_files_are_compared_with_the_record_beside_them(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    check_sums(tmp_path, remedy="")  # nothing is recorded
    write_sums(tmp_path, ["b", "a"])
    digest = hashlib.sha256(b"a").hexdigest()
    assert (tmp_path / "SHA256SUMS").read_text().splitlines()[0] == f"{digest}  a"  # as `sha256sum -c` reads it
    check_sums(tmp_path, remedy="")
    check_sums(tmp_path, ["c"], remedy="")
    (tmp_path / "b").write_text("B")
    check_sums(tmp_path, ["a"], remedy="")
    with pytest.raises(UserError, match=r"/b must be the file that the run wrote, of SHA-256 .*; got .*\. Restore it"):
        check_sums(tmp_path, remedy="Restore it")
    write_sums(tmp_path, ["b"])
    check_sums(tmp_path, remedy="")
    (tmp_path / "a").unlink()
    with pytest.raises(UserError, match=r"/a must be there: .*SHA256SUMS lists it\. Restore it"):
        check_sums(tmp_path, remedy="Restore it")
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  a\nnonsense\n")
    with pytest.raises(UserError, match=r"SHA256SUMS:2 must be a SHA-256, two blanks and a file name; got 'nonsense'"):
        check_sums(tmp_path, remedy="")

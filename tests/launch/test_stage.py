"""`launch/stage.py`: folders come whole, and once."""

import importlib.util
from pathlib import Path

import fsspec
import pytest
from desk import LAUNCH

spec = importlib.util.spec_from_file_location("stage", LAUNCH / "stage.py")
assert spec is not None and spec.loader is not None
stage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage)


@pytest.fixture
def bucket() -> str:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/models/qwen/config.json": b"{}", "/models/qwen/deep/weights": b"0123456789", "/models/other": b"x"})
    yield "memory://models/qwen"
    memory.rm("/models", recursive=True)


def test_a_folder_comes_with_its_folders(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.main([f"{bucket}={tmp_path / 'a b' / 'qwen'}"]) == 0
    target = tmp_path / "a b" / "qwen"
    files = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert files == {"config.json": b"{}", "deep/weights": b"0123456789"}
    assert "2 files, 0.00 GB copied from memory://models/qwen" in capsys.readouterr().out


def test_only_what_is_missing_or_cut_short_is_copied_again(bucket: str, tmp_path: Path) -> None:
    assert stage.stage(bucket, tmp_path) == (2, 12)
    assert stage.stage(bucket, tmp_path) == (0, 0)
    (tmp_path / "deep" / "weights").write_bytes(b"0123")
    assert stage.stage(bucket, tmp_path) == (1, 10)
    assert (tmp_path / "deep" / "weights").read_bytes() == b"0123456789"


def test_a_local_folder_is_a_source_too(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x").write_text("1")
    assert stage.main([f"{tmp_path / 'source'}={tmp_path / 'target'}"]) == 0
    assert (tmp_path / "target" / "x").read_text() == "1"


@pytest.mark.parametrize(
    ("argument", "status", "message"),
    [
        ("models", 2, "SOURCE=TARGET; got 'models'"),
        ("memory://nothing=T", 1, "memory://nothing holds none"),
        ("nosuch://x=T", 1, "nosuch"),
    ],
)
def test_what_cannot_be_copied_is_named(
    argument: str, status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage.main([argument.replace("=T", f"={tmp_path}")]) == status
    assert message in capsys.readouterr().err

"""A tiny encoder of the BERT family, built once for a module, and a copy of it to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bert_files import write_model, write_pooling, write_tokenizer


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    write_model(path)
    write_tokenizer(path)
    write_pooling(path, pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)
    return path


@pytest.fixture
def directory(built: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(built, tmp_path / "encoder"))

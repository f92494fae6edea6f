"""A recipe in a fresh working directory, and the one line of a configuration error."""

from collections.abc import Callable
from pathlib import Path

import pytest

from r3rag_jax.config import ConfigError, load_config


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes `x.yaml` into a fresh working directory and returns its relative path."""
    monkeypatch.chdir(tmp_path)

    def write_text(text: str) -> Path:
        Path("x.yaml").write_text(text, encoding="utf-8")
        return Path("x.yaml")

    return write_text


@pytest.fixture
def error_of() -> Callable[..., str]:
    """The message of the ConfigError that loading a path with overrides raises; always one line."""

    def message_of(path: str | Path, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return message_of

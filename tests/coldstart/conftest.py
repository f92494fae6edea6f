"""Fixtures of the cold start builder's tests."""

from __future__ import annotations

import parts
import pytest

from r3rag_jax.text.transcript import Codec


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture(scope="session")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """The policy's codec, of the protocol `steps`."""
    return parts.codec(tmp_path_factory.mktemp("tokenizer"))

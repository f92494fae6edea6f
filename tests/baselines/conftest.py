"""What the tests of the baselines share."""

from __future__ import annotations

import pytest
import tiny

from r3rag_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))

"""trackio writes to a directory of the tests."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """trackio's own storage, in a directory of the tests: trackio reads TRACKIO_DIR once, when it is imported."""
    directory = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(directory))
        trackio = pytest.importorskip("trackio", reason="needs the extra trackio")
    assert trackio.utils.TRACKIO_DIR == directory, "another test imported trackio first"
    return trackio.SQLiteStorage

"""A directory that lives as long as an object."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path


class TemporaryDirectory:
    """A directory that is deleted with the last object that holds this one."""

    def __init__(self, prefix: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

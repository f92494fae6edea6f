"""The table of trackers: names, missing packages, and a tracker of one's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import r3rag_jax
from r3rag_jax.errors import UserError
from r3rag_jax.run.trackers.factory import TRACKERS, make_trackers


class ListTracker:
    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        self.run_dir, self.config = run_dir, config

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def trajectories(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def finish(self) -> None: ...


def test_names_choose_and_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "list", ListTracker)
    monkeypatch.setitem(TRACKERS, "other", type("Other", (ListTracker,), {}))
    assert make_trackers((), tmp_path, {}) == ()
    one, other = make_trackers(["other", "list"], tmp_path, {"seed": 3})
    assert (type(one).__name__, type(other).__name__) == ("Other", "ListTracker")
    assert (one.run_dir, one.config) == (tmp_path, {"seed": 3})  # type: ignore[attr-defined]


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"log\.trackers must be among tensorboard, trackio, wandb; got 'mlflow'"):
        make_trackers(["tensorboard", "mlflow"], tmp_path, {})


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"log\.trackers must name nothing twice; got trackio, trackio"):
        make_trackers(["trackio", "trackio"], tmp_path, {})


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("trackio", "trackio"), ("wandb", "wandb")]
)
def test_a_missing_package_names_its_extra(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    words = rf"log\.trackers={name} needs the package {package} .*: pip install 'r3rag_jax\[{name}\]'"
    with pytest.raises(UserError, match=words):
        make_trackers([name], tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_packages_are_imported_only_where_they_are_named() -> None:
    code = (
        "import sys; import r3rag_jax.run.trackers.factory as factory; from pathlib import Path\n"
        "factory.make_trackers((), Path('.'), {})\n"
        "print([name for name in ('tensorboardX', 'trackio') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(r3rag_jax.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr

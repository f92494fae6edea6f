"""The W&B tracker: files in `<run>/wandb/`, which `wandb sync` uploads; with WANDB_MODE=online the server at once."""

from __future__ import annotations

import functools
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r3rag_jax.json_text import parse_json
from r3rag_jax.run.files import write_text
from r3rag_jax.run.trackers.base import import_extra
from r3rag_jax.run.trackers.tables import COLUMNS, table_row

PROJECT = "r3rag"


class WandbTracker:
    """Logs with the package wandb, offline unless the environment variable WANDB_MODE says otherwise.

    The phases have axes of their own, `sft/step` and `rl/step`: W&B's own step only grows, and a resumed run repeats
    some. `<run>/wandb.json` holds the id that a resumed run continues. The machine is neither measured nor described.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._package = import_extra("wandb", "wandb")
        self._run_dir, self._config = run_dir, config

    @functools.cached_property
    def _run(self) -> Any:
        settings = self._package.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, disable_job_creation=True,
            x_disable_stats=True, x_disable_meta=True, x_save_requirements=False,
        )  # fmt: skip
        run = self._package.init(
            dir=str(self._run_dir), project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._run_dir.absolute().name, id=self._identity(), resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"), config=json.loads(json.dumps(self._config, default=str)),
            settings=settings,
        )  # fmt: skip
        for phase in ("sft", "rl"):
            run.define_metric(f"{phase}/step", hidden=True)
            run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        return run

    def _identity(self) -> str:
        """The id in `wandb.json`, which the first call writes."""
        file = self._run_dir / "wandb.json"
        if not file.exists():
            write_text(file, json.dumps({"id": uuid.uuid4().hex}) + "\n")
        return str(parse_json(file.read_text())["id"])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        phases = {name.partition("/")[0] for name in metrics}
        self._run.log(dict(metrics) | {f"{phase}/step": step for phase in phases})

    def trajectories(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        table = self._package.Table(columns=list(COLUMNS), data=[list(table_row(row)) for row in rows])
        self._run.log({"trajectories": table, "rl/step": step})

    def finish(self) -> None:
        if "_run" in vars(self):
            self._run.finish()

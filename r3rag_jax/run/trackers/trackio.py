"""The trackio tracker: a local SQLite database, shown by `trackio show --project <name of the run>`."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from r3rag_jax.errors import UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.run.files import write_text
from r3rag_jax.run.trackers.base import import_extra


class TrackioTracker:
    """Writes to the database in `$TRACKIO_DIR`, by default `~/.cache/huggingface/trackio`; never to the network.

    The project is the run's name. A run directory that was removed and made again is another run of the same project:
    `<run>/trackio.json` says which one a resumed run continues.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._package = import_extra("trackio", "trackio")
        self._identity_file = run_dir / "trackio.json"
        self._project = run_dir.absolute().name
        self._config = config
        try:
            self._package.SQLiteStorage.validate_project_name(self._project)
        except ValueError as error:
            raise UserError(f"log.trackers=trackio cannot track a run named {self._project}: {error}") from error

    @functools.cached_property
    def _run(self) -> Any:
        # Not through `trackio.init`, which logs to a server where an environment variable names one.
        class LocalRun(self._package.Run):  # type: ignore[name-defined]
            """A run that never uses the network."""

            def _get_username(self) -> None:
                """The overridden method asks the Hugging Face Hub whose token this machine has."""

        identity = self._identity()
        return LocalRun(
            url=None,
            client=None,
            project=identity["project"],
            name=identity["run"],
            run_id=identity["id"],
            config=json.loads(json.dumps(self._config, default=str)),
        )

    def _identity(self) -> dict[str, str]:
        """Project, name and id of the trackio run: those of `trackio.json`, which the first call writes."""
        if self._identity_file.exists():
            identity: dict[str, str] = parse_json(self._identity_file.read_text())
            return identity
        started = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        identity = {"project": self._project, "run": started, "id": uuid.uuid4().hex}
        write_text(self._identity_file, json.dumps(identity) + "\n")
        return identity

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def trajectories(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        traces = []
        for row in rows:
            metadata = {name: value for name, value in row.items() if name not in ("question", "steps")}
            traces.append(self._package.Trace(messages_of(row), metadata=metadata))
        self._run.log({"trajectories": traces}, step=step)

    def finish(self) -> None:
        if "_run" in vars(self):
            with contextlib.redirect_stdout(io.StringIO()):  # trackio prints that it uploads, which it does not
                self._run.finish()


def messages_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """A trajectory as chat messages: the user asks, the assistant reasons and queries, a tool returns passages."""
    messages = [{"role": "user", "content": row["question"]}]
    for step in row["steps"]:
        lines = [step["analysis"], *(f"{key}: {step[key]}" for key in ("query", "answer") if key in step)]
        messages.append({"role": "assistant", "content": "\n\n".join(lines)})
        if "query" in step:
            passages = "\n\n".join(passage["contents"] for passage in step["passages"])
            messages.append({"role": "tool", "content": passages})
    return messages

"""The curves that a recipe is expected to give: those of recorded runs, files of `reporting/expected/`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from r3rag_jax.config import Config
from r3rag_jax.errors import UserError
from r3rag_jax.reporting.run_files import Run

METRICS = (
    "reward", "reward_outcome", "reward_process", "reward_format", "reward_no_answer", "em", "dev_em",
    "mean_retrievals", "no_answer_rate", "format_error_rate", "trajectory_tokens", "entropy", "kl",
)  # fmt: skip
# Keys that make no other recipe: names, seeds, what is shown, and where and how fast it runs.
FREE = (
    "name", "seed", "world.seed", "run_dir", "phases", "stop_s", "budget", "log", "mesh", "guards", "eval", "baselines",
    "coldstart", "rollout.slots", "rollout.decode_chunk", "rl.checkpoint_every", "rl.checkpoint_minutes",
    "rl.keep_checkpoints", "sft.checkpoint_every", "sft.checkpoint_minutes", "sft.keep_checkpoints",
)  # fmt: skip
Settings = dict[str, Any]  # dotted key -> value


class Expected(NamedTuple):
    """Runs of a recipe."""

    title: str  # e.g. "quickstart, 3 seeds"
    runs: list[list[dict[str, Any]]]  # of each run the rows of RL, METRICS alone


def settings_of(config: str) -> Settings:
    """Dotted key -> value of a configuration (YAML) where it differs from the default; without the keys of FREE."""
    defaults, own = _flat(Config().model_dump(mode="json")), _flat(yaml.safe_load(config) or {})
    return {
        name: value
        for name, value in sorted(own.items())
        if value != defaults.get(name) and not any(name == free or name.startswith(f"{free}.") for free in FREE)
    }


def _flat(tree: Mapping[str, Any], before: str = "") -> Settings:
    found: Settings = {}
    for name, value in tree.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def find_expected(config: str) -> Expected | None:
    """The recorded runs with the settings of a configuration; None where there are none."""
    if not config:
        return None
    try:
        settings = settings_of(config)
    except (yaml.YAMLError, AttributeError):
        return None
    return next((Expected(one["title"], one["runs"]) for one in _recorded() if one["settings"] == settings), None)


@functools.cache
def _recorded() -> list[dict[str, Any]]:
    folder = files("r3rag_jax.reporting") / "expected"
    return [json.loads(file.read_text(encoding="utf-8")) for file in folder.iterdir() if file.name.endswith(".json")]


def expected_json(title: str, runs: Sequence[Run]) -> str:
    """The content of a file of `reporting/expected/`.

    Raises:
        UserError: the runs have different settings, or one has no RL.
    """
    settings = [settings_of(run.config) for run in runs]
    names = {name for one in settings for name in settings[0] | one if one.get(name) != settings[0].get(name)}
    if names:
        rule = "--record: the runs must differ in name and seed alone"
        raise UserError(f"{rule}; got other values of {', '.join(sorted(names))}")
    rows = [
        [
            {"step": row["step"]} | {m: round(row[m], 4) for m in METRICS if m in row}
            for row in run.metrics.get("rl", ())
        ]
        for run in runs
    ]
    if not all(rows):
        raise UserError("--record: every run must have RL; one has none")
    body = ",\n".join(json.dumps(one, separators=(",", ":")) for one in rows)
    head = json.dumps({"title": title, "settings": settings[0]})[:-1]
    return f'{head}, "runs": [\n{body}\n]}}\n'

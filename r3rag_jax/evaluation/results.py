"""The results in a run directory: reading them, naming new ones, and what a new one would replace."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.fingerprint import SUBJECT_FACTS, differences
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.json_text import parse_json
from r3rag_jax.run.directory import RL_TRAJECTORIES, RunDirectory

# Names of files that training writes in the folders of results and trajectories.
RESERVED = (*SYSTEMS, RL_TRAJECTORIES)
SUFFIXES = re.compile(r"(\.(jsonl?|parquet|gz))+$", re.IGNORECASE)
TEST = "test"  # name of the run's own test questions


def read_result(directory: RunDirectory, name: str) -> dict[str, Any] | None:
    """The content of `eval/<name>.json`; None where there is none that can be read."""
    try:
        content = parse_json(directory.evaluation(name).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def load_results(directory: RunDirectory, names: Sequence[str]) -> list[dict[str, Any]]:
    """The results that there are of these systems, in their order."""
    return [result for name in names if (result := read_result(directory, name)) is not None]


def result_name(given: str, questions: Path | None, system: str | None) -> str:
    """The name of the files of an evaluation.

    Args:
        given: what the user calls it; empty: folder and stem of the question file, `hotpotqa/dev.jsonl` ->
            `hotpotqa-dev`, followed by the system if one is given.
        questions: None: the run's test questions.

    Raises:
        UserError: the name is no file name, or the run itself uses it.
    """
    check_name(given)
    name = given or "-".join(filter(None, [file_name(questions) if questions else TEST, system]))
    if name.casefold() in RESERVED:  # a file system may ignore case
        raise UserError(f"--name must be none that the run itself uses ({', '.join(RESERVED)}); got {name}")
    return name


def check_name(given: str) -> None:
    """Check what the user calls a file; "" is none.

    Raises:
        UserError: it is no file name.
    """
    if given and re.fullmatch(r"\w[\w.+-]*", given) is None:
        raise UserError(f"--name must be letters, digits and _.+-, not led by a sign; got {given!r}")


def file_name(path: Path) -> str:
    """Folder and stem of a question file: `hotpotqa/dev.jsonl` -> `hotpotqa-dev`."""
    path = path.absolute()
    parts = [path.resolve().parent.name if path.parent.name in ("", "..") else path.parent.name]
    parts.append(SUFFIXES.sub("", path.name) or path.name)
    words = (re.sub(r"[^\w.+-]+", "-", part).strip("-") for part in parts)
    return "-".join(filter(None, words)).lstrip(".+-")


def replaced_result(directory: RunDirectory, name: str, fingerprint: Mapping[str, Any]) -> str:
    """What a new result replaces: a sentence, or "" where there is none or one of the same evaluation.

    Raises:
        UserError: the existing result is of other questions.
    """
    old = (read_result(directory, name) or {}).get("fingerprint")
    if not isinstance(old, dict):
        return ""
    path = directory.evaluation(name)
    if old.get("questions") != fingerprint["questions"]:
        raise UserError(f"{path} must be a result of the same questions to be replaced; give another --name=…")
    changed = differences(old, fingerprint) + [fact for fact in SUBJECT_FACTS if old.get(fact) != fingerprint[fact]]
    return f"{path} is replaced, which differs in {', '.join(changed)}" if changed else ""

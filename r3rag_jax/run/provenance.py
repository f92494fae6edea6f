"""What a phase was trained from: recorded with its checkpoints and its policy, and compared before it goes on.

A provenance is a JSON object of digests:

    base        the model at `model.path`
    cold_start  RL: the policy of the cold start, from which RL begins; "" where RL begins from the base
    data        the trajectories of the cold start, or the questions of RL
    corpus      the passages of the index
    left_out    how many records of which files `data.on_error=skip` left out; is not compared

A digest that is missing on one side is not compared: a file may have been removed after the phase.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from etils import epath

from r3rag_jax.errors import UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.parallel.processes import exists, on_process_0
from r3rag_jax.run.checkpoints import Checkpoints
from r3rag_jax.run.digests import PROVENANCE_FILE

Provenance = Mapping[str, str]
PROVENANCE = "provenance"  # its name in the note of a checkpoint
KEYS = {"base": "model.path", "data": "data.{phase}", "corpus": "data.corpus"}  # the key that a digest is of


def read_provenance(policy: Path) -> Provenance:
    """The provenance of a finished phase's policy; empty where none was recorded."""
    try:
        content = parse_json((policy / PROVENANCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def has_finished(policy: Path, expected: Provenance) -> bool:
    """Whether a phase has its policy, which was trained from what the phase would be trained from now.

    Process 0 looks; all processes must call.

    Raises:
        UserError: it was trained from something else.
    """
    return bool(on_process_0(lambda: _has_finished(policy, expected), f"has finished {policy.name}"))


def _has_finished(policy: Path, expected: Provenance) -> bool:
    if not policy.exists():
        return False
    recorded = dict(read_provenance(policy))
    if not expected.get("cold_start"):
        recorded.pop("cold_start", None)  # the cold start's policy was removed after RL
    check_provenance(policy.name, policy, recorded, expected)
    return True


def check_provenance(phase: str, place: os.PathLike[str], recorded: Provenance, expected: Provenance) -> None:
    """Compare what a phase was begun from with what it would be begun from now.

    Args:
        place: directory of its checkpoints or its policy.

    Raises:
        UserError: they differ.
    """
    differing = [name for name in recorded.keys() & expected.keys() if recorded[name] != expected[name]]
    if "cold_start" in differing:
        raise UserError(
            f"RL must go on from what it began with: {place} began from {_start(recorded)}, and this run now has "
            f"{_start(expected)}. Choose another name=…, or remove policy/rl and checkpoints/rl to train RL again"
        )
    for name, key in KEYS.items():
        if name in differing:
            raise UserError(
                f"{key.format(phase=phase)} must be what phase {phase} began with: {place} was trained from "
                f"{recorded[name]}; got {expected[name]}. Restore it, or choose another name=…"
            )


def check_order(phases: tuple[str, ...], sft: Path, rl: Path, rl_checkpoints: Path | epath.Path) -> None:
    """Refuse to train a cold start after RL has begun from the base. All processes must call.

    Args:
        sft, rl: directories of the two phases' policies.

    Raises:
        UserError: RL would not be of this cold start.
    """
    if "sft" not in phases or exists(sft):
        return
    place: Path | epath.Path = rl
    recorded: Provenance = on_process_0(lambda: dict(read_provenance(rl)), "provenance of rl")
    if not exists(rl) and exists(rl_checkpoints):
        checkpoints = Checkpoints(rl_checkpoints, read_only=True)
        place, recorded = rl_checkpoints, (checkpoints.note() or {}).get(PROVENANCE, {})
        checkpoints.close()
    if recorded.get("cold_start") == "":
        raise UserError(
            f"phases must not have sft after RL has begun from the base model ({place}): RL would not be of this cold "
            "start. Choose another name=…, or remove policy/rl and checkpoints/rl to train RL after the cold start"
        )


def _start(provenance: Provenance) -> str:
    digest = provenance["cold_start"]
    return f"the cold start {digest}" if digest else "the base model"

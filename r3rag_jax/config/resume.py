"""Which keys may change when a run is resumed."""

from __future__ import annotations

from typing import Any

from r3rag_jax.config.experiment import Config
from r3rag_jax.config.schema import schema, value_of

# Keys, and sections with all their keys, that change nothing of what the run has computed. (With data.on_error=stop
# nothing was computed from a file with a record that `skip` leaves out.)
FREE_KEYS = ("run_dir", "phases", "eval", "guards", "mesh", "log", "rollout.server", "data.on_error")
# Where a server is and how patiently it is called; which model it serves (`model`) is no such key.
CONNECTION_KEYS = ("url", "key_env", "max_in_flight", "requests_per_minute", "retries", "timeout_s")
FREE_OF_RETRIEVAL = tuple(f"retrieval.endpoint.{name}" for name in CONNECTION_KEYS)
# Free even while rewards depend on the judge; its other keys are free only where no reward does.
FREE_OF_JUDGE = (
    *(f"judge.endpoint.{name}" for name in CONNECTION_KEYS),
    "judge.max_failure_share",
    "judge.cache",
    "judge.local.slots",
)


def changed_keys(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value) of every key that differs although it must not when a run is resumed."""
    pairs = {name: (value_of(old, name), value_of(new, name)) for name in schema() if not _is_free(name, old)}
    return {name: (was, now) for name, (was, now) in pairs.items() if was != now}


def _is_free(name: str, old: Config) -> bool:
    """Whether a dotted key may change: one of FREE_KEYS, of such a section, or of a judge that rewards do not need."""
    if name.startswith("judge."):
        return name in FREE_OF_JUDGE or not old.rewards.needs_judge
    return name in FREE_OF_RETRIEVAL or any(name == free or name.startswith(f"{free}.") for free in FREE_KEYS)

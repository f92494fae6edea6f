"""Which keys may change when a run is resumed."""

from __future__ import annotations

from typing import Any

from r3rag_jax.config.experiment import Config
from r3rag_jax.config.schema import schema, value_of

# Reason -> keys, and sections with all their keys, that change nothing of what the run computes.
FREE_KEYS = {
    "where it is, what is done next, and how it is stopped": ("run_dir", "phases", "stop_s"),
    "a name: the keys of a budget are compared one by one": ("budget",),
    "its passages are compared with what was indexed and trained on": ("retrieval.index_dir",),
    "results that depend on it are evaluated again": (
        "eval",
        "data.test",
        "baselines",
        "rollout.server",
    ),
    "what is shown and recorded": ("log",),
    "what ends a run": ("guards",),
    "it made the file data.sft, which is compared": ("coldstart",),
    "it changes no data": ("data.leakage",),
    "with `stop`, nothing was computed from a file with a record that `skip` leaves out": ("data.on_error",),
    "memory and speed; numbers are the same but for rounding": (
        "mesh",
        "data.storage",
        "model.remat",
        "model.micro_tokens",
        "rollout.slots",
        "rollout.shard_weights",
        "rollout.decode_chunk",
        "rollout.search_overlap",
        "retrieval.encoder.batch_tokens",
        "retrieval.encoder.batch_texts",
        "retrieval.encoder.encoding_format",
        "retrieval.memory_gb",
        "retrieval.cached_queries",
    ),
    "how much is lost when a run is killed": (
        "sft.checkpoint_every",
        "sft.checkpoint_minutes",
        "sft.keep_checkpoints",
        "rl.checkpoint_minutes",
        "rl.keep_checkpoints",
        "rl.keep_best",
    ),
}
# Asynchronous rollouts are not started across a checkpoint or an evaluation, so there these keys say which policy
# samples.
FREE_UNLESS_ASYNC = ("rl.checkpoint_every", "rl.eval_every")
# Where a server is and how patiently it is called; which model it serves (`model`) is no such key.
CONNECTION_KEYS = ("url", "replicas", "key_env", "max_in_flight", "requests_per_minute", "retries", "timeout_s")
FREE_OF_RETRIEVAL = (
    *(f"retrieval.endpoint.{name}" for name in (*CONNECTION_KEYS, "format")),
    *(f"retrieval.encoder.endpoint.{name}" for name in CONNECTION_KEYS),
    *(f"retrieval.milvus.{name}" for name in ("uri", "key_env", "timeout_s")),
)
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
    """Whether a dotted key may change: it is in a table above, in such a section, or of a judge that nothing needs."""
    if name.startswith("judge."):
        return name in FREE_OF_JUDGE or not old.rewards.needs_judge
    if name in FREE_UNLESS_ASYNC:
        return not old.rl.async_rollouts
    free_keys = (key for keys in FREE_KEYS.values() for key in keys)
    return name in FREE_OF_RETRIEVAL or any(name == key or name.startswith(f"{key}.") for key in free_keys)

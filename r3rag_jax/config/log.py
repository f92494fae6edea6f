"""Section `log`: what a run shows and records."""

from __future__ import annotations

from typing import ClassVar

from r3rag_jax.config.section import Section, key


class LogConfig(Section):
    """What a run shows and records. `metrics.jsonl` is always written."""

    dotted: ClassVar[str] = "log"

    progress: bool = key(True, "show live progress bars in a terminal")
    watchdog_s: float = key(
        1800, "time without any movement after which every thread's place is written to stalls/; 0: never", "s", ge=0
    )
    trajectories: int = key(
        8, "trajectories recorded per RL iteration, at least all samples of one question; 0: none", "trajectories", ge=0
    )
    tokens: bool = key(True, "record their tokens with log-probability and advantage")
    entropy: bool = key(False, "record the entropy of each of their tokens; costs a forward pass")
    profile: int = key(-1, "RL iteration of which a JAX profile is written to profile/; -1: none", "iteration", ge=-1)
    # The names are those of the table in run/trackers/factory.py, which checks them: a new tracker is a line there.
    trackers: tuple[str, ...] = key((), "experiment trackers that also get the metrics, e.g. tensorboard,trackio")

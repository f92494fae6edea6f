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
    trajectories: int = key(8, "trajectories recorded per RL iteration", "trajectories", ge=0)
    # The names are those of the table in run/trackers/factory.py, which checks them: a new tracker is a line there.
    trackers: tuple[str, ...] = key((), "experiment trackers that also get the metrics, e.g. tensorboard,trackio")

"""Section `log`: what a run shows and records."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from r3rag_jax.config.section import Section, check_names, key

TRACKERS = ("tensorboard", "trackio")


class LogConfig(Section):
    """What a run shows and records. `metrics.jsonl` is always written."""

    dotted: ClassVar[str] = "log"

    progress: bool = key(True, "show live progress bars in a terminal")
    trajectories: int = key(8, "trajectories recorded per RL iteration", "trajectories", ge=0)
    trackers: tuple[str, ...] = key((), f"experiment trackers that also get the metrics, among {', '.join(TRACKERS)}")

    @field_validator("trackers")
    @classmethod
    def _check_trackers(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        return check_names(trackers, TRACKERS, may_be_empty=True)
